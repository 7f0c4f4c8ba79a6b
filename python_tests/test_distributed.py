"""Processes that train together against one that trains alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch

from crpt.distributed import ALONE, launched_by_torchrun, own_device
from crpt.encoder import Encoder
from crpt.pretrain import pretrain
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory

HERE = Path(__file__).parent
SCRIPT = HERE / "team_pretrain.py"


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
def test_shares_of_a_batch_train_like_the_whole_of_it(dataset, tmp_path, objective, batches, norm):
    together(2, str(dataset), str(tmp_path), batches, norm, objective)
    config = replace(
        small.PRETRAIN, rounds=25, objective=objective, batches=batches, embedding_norm=norm,
        learning_rate=1e-4, log_every=1,
    )  # fmt: skip
    run = RunDirectory(tmp_path / "alone")
    alone = pretrain(config, ReplayBuffer.open(dataset), run, seed=0, progress=False)
    team_run = RunDirectory(tmp_path / objective)
    pairs = list(zip(run.metrics("pretrain"), team_run.metrics("pretrain"), strict=True))
    assert len(pairs) == 50
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for key in ("loss", "distance_from_trivial"):
            assert theirs[key] == pytest.approx(mine[key], abs=1e-4), mine["step"]
    encoder = Encoder.from_pretrained(team_run.path)
    for key, tensor in alone.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[key], tensor, atol=2e-3, rtol=2e-3)


def test_three_processes_share_a_batch_that_three_does_not_divide(dataset, tmp_path):
    with pytest.raises(AssertionError, match="batch_size should be a multiple of the 3 processes"):
        together(3, str(dataset), str(tmp_path), "alternate", "batch", "crptpro")


def test_a_process_that_dies_ends_the_others_and_loses_nothing(dataset, tmp_path):
    with pytest.raises(AssertionError):
        together(2, str(dataset), str(tmp_path), "alternate", "batch", "--die", "crptpro")
    checkpoint = torch.load(tmp_path / "crptpro" / "checkpoints" / "pretrain.pt", weights_only=True)
    assert checkpoint["round"] == 4  # of the last checkpoint before the death, in round 6
    lines = (tmp_path / "crptpro" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} >= {1, 2, 3, 4}
    together(2, str(dataset), str(tmp_path), "alternate", "batch", "crptpro")
    assert Encoder.from_pretrained(tmp_path / "crptpro").frozen


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


def test_each_process_takes_the_gpu_of_its_number_unless_one_was_named(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert own_device(torch.device("cuda:3")) == torch.device("cuda:3")
    assert own_device(torch.device("cpu")) == torch.device("cpu")
