"""The main job as a newcomer runs it; minutes, so only on request."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_quick_learns_and_repeats_its_figures(tmp_path):
    summaries = []
    for name in ("first", "again"):
        run_dir = str(tmp_path / name)
        flags = ["--preset", "quick", "--device", "cpu", "--run-dir", run_dir]
        subprocess.run([sys.executable, "-m", "crpt.train", *flags], check=True)
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    first, again = summaries
    assert first == again
    assert first["mean_gain_seen"] >= 0.10
    assert all(
        p["gain"] > 0 for p in first["probe"]["domains"] if p["seen"] and p["features"] == "z"
    )
    policy, random = first["evaluation"]["policy"], first["evaluation"]["random"]
    assert policy["return_mean"] > 2 * random["return_mean"]
    assert policy["return_mean"] > random["return_mean"] + policy["return_std"] / 2
    assert all(line["distance_from_trivial"] > 0.1 for line in first["pretrain"])
