"""Processes that train together against one that trains alone."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.distributed as dist

from crpt.distributed import (
    ALONE,
    Team,
    _sendable,
    launched_by_torchrun,
)
from crpt.encoder import Encoder
from crpt.objectives.team_norm import TeamBatchNorm1d
from crpt.ops import conv_cpu
from crpt.pretrain import pretrain
from crpt.pretrain.inputs import dataset_identity
from crpt.pretrain.trainer import Trainer
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory
from crpt.standardisation import Standardisation

CPU = torch.device("cpu")
HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
}
DIFFERENCES = {"rounds": 25, "learning_rate": 1e-4, "log_every": 1}
"""Of what the script trains with, from small.PRETRAIN."""
SMALL = ("float32", json.dumps(DIFFERENCES))


def team_command(size: int, *arguments: str, script: str = "team_pretrain.py") -> list[str]:
    return [*TORCHRUN, "--nproc-per-node", str(size), str(HERE / script), *arguments]


def together(size: int, *arguments: str, script: str = "team_pretrain.py") -> None:
    done = subprocess.run(
        team_command(size, *arguments, script=script),
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


def ranks_of(agent: subprocess.Popen) -> dict[int, int]:
    """Rank: process id, of those that torchrun has started."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is somebody else's
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(agent.pid):
                environ = (process / "environ").read_text().split("\0")
                settings = dict(line.split("=", 1) for line in environ if "=" in line)
                found[int(settings["RANK"])] = int(process.name)
    return found


def wait_for(condition, agent: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert agent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


def alone_and_together(dataset, runs, *flags, **differences):
    """An encoder trained by one process, one by two, and the pairs of their lines in the logs."""
    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    differences = DIFFERENCES | differences
    together(2, str(dataset), str(runs), dtype, json.dumps(differences), *flags)
    run, team_run = RunDirectory(runs / "alone"), RunDirectory(runs / "team")
    config = replace(small.PRETRAIN, **differences)
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
    alone, team, pairs = alone_and_together(
        dataset, tmp_path, objective=objective, batches=batches, embedding_norm=norm
    )
    check_lines(pairs, within=1e-9)
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(team.state_dict()[key], tensor, atol=1e-8, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "differences",
    [{}, {"domains": ("dot_red", "dot_blue"), "weights": (3.0, 1.0)}],
    ids=["equal", "weighted"],
)
@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_shares_are_streamed_where_the_frames_do_not_fit(
    float64, dataset, tmp_path, differences, batches
):
    differences = differences | {"batches": batches}
    _, _, pairs = alone_and_together(dataset, tmp_path, "--stream", **differences)
    check_lines(pairs, within=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_float32_is_shared_like_float64_within_its_rounding(dataset, tmp_path, batches):
    _, _, pairs = alone_and_together(dataset, tmp_path, batches=batches, learning_rate=1e-5)
    check_lines(pairs, within=1e-5)


def rms_difference(pairs, key) -> float:
    return (sum((a[key] - b[key]) ** 2 for a, b in pairs) / len(pairs)) ** 0.5


# What one rounding moves grows from update to update, and the largest of 50 differences with it,
# on one processor more than on another: measured by what bf16 itself does to the same training.
@pytest.mark.slow
@pytest.mark.skipif(not conv_cpu.available(CPU, 9, 20), reason="no units for bf16")
@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_bf16_is_shared_within_its_rounding(dataset, tmp_path, batches):
    differences = {"batches": batches, "learning_rate": 1e-5}
    _, _, pairs = alone_and_together(dataset, tmp_path, **differences, precision="bf16")
    exact = RunDirectory(tmp_path / "fp32")
    config = replace(small.PRETRAIN, **DIFFERENCES | differences)
    pretrain(config, ReplayBuffer.open(dataset), exact, seed=0, progress=False)
    rounded = [(mine, line) for (mine, _), line in zip(pairs, exact.metrics(), strict=True)]
    for key in ("loss", "distance_from_trivial", "effective_rank"):
        assert rms_difference(pairs, key) <= 1.5 * rms_difference(rounded, key), key


def test_three_processes_share_a_batch_that_three_does_not_divide(dataset):
    with pytest.raises(ValueError, match="batch_size should be a multiple of the 3 processes, got"):
        Trainer(small.PRETRAIN, ReplayBuffer.open(dataset), seed=0, device=CPU, team=Team(1, 3))


@pytest.mark.slow
def test_the_error_of_one_process_is_told_by_all(dataset, tmp_path):
    with pytest.raises(AssertionError, match="batch_size should be a multiple of the 3 processes"):
        together(3, str(dataset), str(tmp_path), *SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("go_on", ["alone", "together"])
def test_a_process_that_dies_ends_the_others_and_loses_nothing(dataset, tmp_path, go_on):
    with pytest.raises(
        AssertionError,
        match=r"TeamError: process 1 of the team .* has ended or cannot be reached; .*"
        r"The checkpoint of round 4 is kept: the same command goes on from it",
    ):
        together(2, str(dataset), str(tmp_path), *SMALL, "--die")
    run = RunDirectory(tmp_path / "team")
    # The last checkpoint before the death, in round 6.
    assert run.load_checkpoint("pretrain")["round"] == 4
    assert {line["step"] for line in run.metrics()} >= {1, 2, 3, 4}
    if go_on == "together":
        together(2, str(dataset), str(tmp_path), *SMALL)
    else:
        config = replace(small.PRETRAIN, **DIFFERENCES)
        pretrain(config, ReplayBuffer.open(dataset), run, seed=0, progress=False)
    assert Encoder.from_pretrained(run.path).frozen
    assert {line["step"] for line in run.metrics()} == set(range(1, 26))


@pytest.mark.slow
def test_processes_that_see_different_files_are_told(dataset, tmp_path):
    saved = RunDirectory(tmp_path / "runs0" / "team")
    saved.save_checkpoint("pretrain", {"round": 4})
    with pytest.raises(
        AssertionError, match=r"round of the checkpoint should .* got 4 in .* 0 and None in .* 1"
    ):
        together(2, str(dataset), str(tmp_path / "runs{rank}"), *SMALL)
    assert not (tmp_path / "runs1").exists()
    (tmp_path / "data0").symlink_to(dataset)
    small.dataset(tmp_path / "data1", replace(small.COLLECT, transitions=80))
    with pytest.raises(
        AssertionError, match=r"dataset\.dot_blue should .* got 120 in .* 0 and 80 in .* 1"
    ):
        together(2, str(tmp_path / "data{rank}"), str(tmp_path / "runs"), *SMALL)


@pytest.mark.slow
def test_processes_that_differ_are_told_in_what(dataset, tmp_path):
    small.dataset(tmp_path / "seed", seed=1)
    small.dataset(tmp_path / "render", replace(small.COLLECT, render="fast"))
    shutil.copytree(dataset, tmp_path / "content")
    frames = np.load(tmp_path / "content" / "dot_blue" / "frames.npy", mmap_mode="r+")
    frames[:] = 255 - frames
    frames.flush()
    digests = [
        repr(dataset_identity(ReplayBuffer.open(path))["dataset_content"]["dot_blue"])
        for path in (dataset, tmp_path / "content")
    ]
    begun = RunDirectory(tmp_path / "begun")
    begun.claim({"seed": 3})
    begun.save_checkpoint("pretrain", {"round": 4})
    together(2, str(dataset), str(tmp_path), script="team_mismatch.py")
    mine, theirs = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1))
    assert mine == theirs
    assert {case: text.split(";")[0] for case, text in mine.items() if case != "begun"} == {
        case: f"{name} should be the same for all processes, got {a} in process 0 and {b} in "
        "process 1"
        for case, (name, a, b) in {
            "seed": ("seed", "0", "5"),
            "learning_rate": ("learning_rate", "0.001", "0.01"),
            "batches": ("batches", "'alternate'", "'mixed'"),
            "batch_size": ("batch_size", "16", "32"),
            "log_every": ("log_every", "2", "3"),
            "precision": ("precision", "'fp32'", "'bf16'"),
            "dataset_seed": ("dataset.seed", "0", "1"),
            "dataset_render": ("dataset.render", "'exact'", "'fast'"),
            "dataset_content": ("dataset_content.dot_blue", *digests),
        }.items()
    }
    assert mine["seed"].endswith("; start all processes with the same arguments")
    assert mine["precision"].endswith("choose --precision fp32, or bf16")
    # What the process that leads alone can find out.
    assert "seed: 3 -> 0" in mine["begun"]


@pytest.mark.slow
def test_a_stop_of_all_processes_waits_for_the_checkpoint(dataset, tmp_path):
    """As clusters preempt: SIGTERM to every process, and once more by torchrun."""
    long = json.dumps(DIFFERENCES | {"rounds": 4000, "checkpoint_every": 4000})
    log = tmp_path / "log"
    with log.open("w") as stderr:
        agent = subprocess.Popen(
            team_command(2, str(dataset), str(tmp_path), "float32", long, "--slow-save"),
            env=ENVIRONMENT, stderr=stderr,
        )  # fmt: skip
    run = RunDirectory(tmp_path / "team")
    wait_for(lambda: len(run.metrics()) >= 4, agent)
    for pid in (agent.pid, *ranks_of(agent).values()):
        os.kill(pid, signal.SIGTERM)
    assert agent.wait(60) != 0
    done = run.load_checkpoint("pretrain")["round"]
    told = log.read_text()
    assert told.count(f"Interrupted: pretrain stopped after round {done} of 4000") == 2
    assert told.count("stopped, saved: True") == 2


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_encoder(dataset, tmp_path):
    """`torchrun -m crpt.pretrain`, as users type it."""

    def command(name):
        flags = """--preset quick --device cpu --rounds 300 --batch-size 16 --projection-dim 16
        --predictor-hidden 32 --prototypes 32 --shift-pad 1 --checkpoint-every 60"""
        places = ["--run-dir", str(tmp_path / name), "--dataset", str(dataset)]
        return [*TORCHRUN, "--nproc-per-node", "2", "-m", "crpt.pretrain", *flags.split(), *places]

    subprocess.run(command("whole"), env=ENVIRONMENT, check=True, timeout=300)
    whole, cut = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "cut")
    agent = subprocess.Popen(command("cut"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(cut.metrics()) >= 2 * 15, agent)  # a line of each domain in ten rounds
    os.kill(ranks_of(agent)[1], signal.SIGKILL)
    _, told = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert "error: process 1 of the team" in told
    at = cut.load_checkpoint("pretrain")["round"]
    assert 120 <= at < 300
    assert f"The checkpoint of round {at} is kept: the same command goes on from it" in told
    assert not cut.encoder_dir.exists()
    subprocess.run(command("cut"), env=ENVIRONMENT, check=True, timeout=300)
    mine, theirs = (Encoder.from_pretrained(run.path).state_dict() for run in (whole, cut))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert cut.metrics_file.read_text() == whole.metrics_file.read_text()


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
    ALONE.require_same({"x": x}, "none")
    done = []
    ALONE.lead(lambda: done.append(1))
    assert done == [1]


def test_a_copy_of_a_team_s_norm_belongs_to_no_team_and_is_as_exact():
    norm = copy.deepcopy(TeamBatchNorm1d(Standardisation(3), None))
    assert type(norm) is Standardisation
    assert norm.half().running_var.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_a_team_s_norm_is_where_and_as_the_norm_is_that_it_stands_for(training):
    norm = Standardisation(3, eps=1e-3, momentum=0.01, dtype=torch.float64).train(training)
    norm.running_mean.fill_(0.1)
    with torch.device("meta"):  # as a GPU's is not, where no default was set
        shared = TeamBatchNorm1d(norm, None)
        alone = copy.deepcopy(shared)
    for same in (shared, alone):
        assert (same.eps, same.momentum, same.training) == (1e-3, 0.01, training)
        for name, buffer in norm.named_buffers():
            assert torch.equal(same.get_buffer(name), buffer)
            assert same.get_buffer(name).dtype == buffer.dtype


def test_what_differs_between_processes_is_told_to_all(monkeypatch):
    """In one process; test_processes_that_differ_are_told_in_what starts two."""
    same = {"seed": 0, "lr": 1e-3}
    told = [same, same, {"seed": 5, "lr": 1e-2}]

    def gather(found, mine, group):
        assert mine == same
        found[:] = told

    monkeypatch.setattr(dist, "all_gather_object", gather)
    team = Team(1, 3, group=object(), control=object())
    with pytest.raises(ValueError, match="the same") as error:
        team.require_same(same, "start them alike")
    assert str(error.value) == (
        "seed should be the same for all processes, got 0 in process 0 and 5 in process 2; "
        "lr should be the same for all processes, got 0.001 in process 0 and 0.01 in process 2; "
        "start them alike"
    )
    told[2] = dict(same)
    team.require_same(same, "start them alike")


def test_an_error_that_cannot_be_sent_is_told_in_words():
    class Local(Exception):
        """Of a class that another process cannot find."""

    assert repr(_sendable(Local("no room"))) == repr(RuntimeError("Local: no room"))
    error = ValueError("no room")
    assert _sendable(error) is error
