"""Processes that train together against one that trains alone."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch

from crpt.distributed import ALONE, Team, launched_by_torchrun, own_device
from crpt.encoder import Encoder
from crpt.pretrain import pretrain
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory
from crpt.trainer import Trainer

CPU = torch.device("cpu")
HERE = Path(__file__).parent
SCRIPT = HERE / "team_pretrain.py"
SMALL = ("float32", "1e-4", "alternate", "batch")  # how the script trains where all are as good


def together(size: int, *arguments: str) -> None:
    flags = ["--standalone", "--nproc-per-node", str(size), str(SCRIPT), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *flags],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dataset"
    small.dataset(path)
    return path


SLOW = pytest.mark.slow


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config_of(objective, batches, norm, learning_rate):
    """What the script trains with."""
    return replace(
        small.PRETRAIN, rounds=25, objective=objective, batches=batches, embedding_norm=norm,
        learning_rate=learning_rate, log_every=1,
    )  # fmt: skip


def alone_and_together(dataset, runs, objective, batches, norm, learning_rate=1e-4):
    """An encoder trained by one process, one by two, and the pairs of their lines in the logs."""
    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    rate = str(learning_rate)
    together(2, str(dataset), str(runs), dtype, rate, batches, norm, objective)
    config = config_of(objective, batches, norm, learning_rate)
    run, team_run = RunDirectory(runs / "alone"), RunDirectory(runs / objective)
    alone = pretrain(config, ReplayBuffer.open(dataset), run, seed=0, progress=False)
    pairs = list(zip(run.metrics("pretrain"), team_run.metrics("pretrain"), strict=True))
    assert len(pairs) == 50
    return alone, Encoder.from_pretrained(team_run.path), pairs


def check_lines(pairs, *, within):
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for key in ("loss", "distance_from_trivial"):
            assert theirs[key] == pytest.approx(mine[key], rel=0, abs=within), mine["step"]
        # Of the whole batch, too: ranks of a share would be lower, and fewer prototypes in use.
        for key in mine.keys() & {"effective_rank", "usage_entropy", "gradient_norm"}:
            assert theirs[key] == pytest.approx(mine[key], rel=1e3 * within), (key, mine["step"])
        assert theirs.get("prototypes_in_use") == mine.get("prototypes_in_use"), mine["step"]


# In float64: float32 rounds otherwise on another processor, or in shares, and Adam, which steps by
# the sign of a gradient that is all but nothing, makes 1e-4 and more of that in a few updates.
@pytest.mark.parametrize(
    ("objective", "batches", "norm"),
    [
        ("crptpro", "alternate", "batch"),
        pytest.param("crptpro", "mixed", "batch", marks=SLOW),
        pytest.param("crptpro", "alternate", "none", marks=SLOW),
        pytest.param("atc", "alternate", "none", marks=SLOW),
        pytest.param("byol", "mixed", "none", marks=SLOW),
        pytest.param("autoencoder", "alternate", "batch", marks=SLOW),
    ],
)
def test_shares_of_a_batch_train_like_the_whole_of_it(
    float64, dataset, tmp_path, objective, batches, norm
):
    alone, team, pairs = alone_and_together(dataset, tmp_path, objective, batches, norm)
    check_lines(pairs, within=1e-9)
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(team.state_dict()[key], tensor, atol=1e-8, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_float32_is_shared_like_float64_until_rounding_has_grown(dataset, tmp_path, batches):
    _, _, pairs = alone_and_together(dataset, tmp_path, "crptpro", batches, "batch", 1e-5)
    check_lines(pairs[:1], within=1e-5)  # before the first step of Adam
    check_lines(pairs[:6], within=1e-4)


def test_three_processes_share_a_batch_that_three_does_not_divide(dataset):
    with pytest.raises(ValueError, match="batch_size should be a multiple of the 3 processes, got"):
        Trainer(small.PRETRAIN, ReplayBuffer.open(dataset), seed=0, device=CPU, team=Team(1, 3))


@pytest.mark.slow
def test_the_error_of_one_process_is_told_by_all(dataset, tmp_path):
    with pytest.raises(AssertionError, match="batch_size should be a multiple of the 3 processes"):
        together(3, str(dataset), str(tmp_path), *SMALL, "crptpro")


@pytest.mark.parametrize("go_on", ["alone", pytest.param("together", marks=SLOW)])
def test_a_process_that_dies_ends_the_others_and_loses_nothing(dataset, tmp_path, go_on):
    with pytest.raises(AssertionError):
        together(2, str(dataset), str(tmp_path), *SMALL, "--die", "crptpro")
    run = RunDirectory(tmp_path / "crptpro")
    # The last checkpoint before the death, in round 6.
    assert run.load_checkpoint("pretrain")["round"] == 4
    assert {line["step"] for line in run.metrics()} >= {1, 2, 3, 4}
    if go_on == "together":
        together(2, str(dataset), str(tmp_path), *SMALL, "crptpro")
    else:
        config = config_of("crptpro", "alternate", "batch", 1e-4)
        pretrain(config, ReplayBuffer.open(dataset), run, seed=0, progress=False)
    assert Encoder.from_pretrained(run.path).frozen
    assert {line["step"] for line in run.metrics()} == set(range(1, 26))


@pytest.mark.slow
def test_processes_that_see_different_files_are_told(dataset, tmp_path):
    saved = RunDirectory(tmp_path / "runs0" / "crptpro")
    saved.save_checkpoint("pretrain", {"round": 4})
    with pytest.raises(AssertionError, match=r"got \(4, False\) in .* 0 and \(None, False\) in"):
        together(2, str(dataset), str(tmp_path / "runs{rank}"), *SMALL, "crptpro")
    assert not (tmp_path / "runs1").exists()
    (tmp_path / "data0").symlink_to(dataset)
    small.dataset(tmp_path / "data1", replace(small.COLLECT, transitions=80))
    with pytest.raises(AssertionError, match=r"'dot_blue': 120.* 0 and .*'dot_blue': 80"):
        together(2, str(tmp_path / "data{rank}"), str(tmp_path / "runs"), *SMALL, "crptpro")


def test_a_process_of_its_own_is_a_team_of_one(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not launched_by_torchrun()
    assert ALONE.leads
    assert ALONE.share(7) == slice(0, 7)
    assert ALONE.any(True)
    assert not ALONE.any(False)
    x = torch.randn(3, 2)
    assert torch.equal(ALONE.gather(x), x)
    assert torch.equal(ALONE.mean(x), x)
    ALONE.require_same("x", x)


def test_each_process_takes_the_gpu_of_its_number_unless_one_was_named(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert own_device(torch.device("cuda:3")) == torch.device("cuda:3")
    assert own_device(torch.device("cpu")) == torch.device("cpu")
