"""The main job as a newcomer runs it; minutes, so only on request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(command: str, run_dir: Path, *flags: str) -> None:
    line = [sys.executable, "-m", f"crpt.{command}", "--preset", "quick", "--device", "cpu"]
    subprocess.run([*line, "--run-dir", str(run_dir), *flags], check=True)


def mean_gain(probe: dict[str, Any], *, seen: bool) -> float:
    """Of the held-out R2 of z over the same encoder at init."""
    rows = (r for r in probe["domains"] if r["features"] == "z" and r["seen"] == seen)
    gains = [row["gain"] for row in rows]
    return sum(gains) / len(gains)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("quick") / "seed0"
    run("train", path)
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return summary


def test_the_same_seed_gives_the_same_figures(whole_run, tmp_path):
    run("train", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "summary.json").read_text()) == whole_run


def test_one_run_learns_in_every_stage(whole_run):
    assert whole_run["mean_gain_seen"] >= 0.10
    assert all(
        p["gain"] > 0 for p in whole_run["probe"]["domains"] if p["seen"] and p["features"] == "z"
    )
    policy, random = whole_run["evaluation"]["policy"], whole_run["evaluation"]["random"]
    assert policy["return_mean"] > 2 * random["return_mean"]
    assert policy["return_mean"] > random["return_mean"] + policy["return_std"] / 2
    assert all(line["distance_from_trivial"] > 0.1 for line in whole_run["pretrain"])


def test_three_seeds_know_more_than_at_init_of_seen_and_of_unseen_domains(whole_run, tmp_path):
    probes = [whole_run["probe"]]
    for seed in ("1", "2"):
        for stage in ("collect", "pretrain", "probe"):
            run(stage, tmp_path / seed, "--seed", seed)
        probes.append(json.loads((tmp_path / seed / "probe.json").read_text()))
    assert sum(mean_gain(probe, seen=True) for probe in probes) / 3 >= 0.15
    assert sum(mean_gain(probe, seen=False) for probe in probes) / 3 > 0
