"""What `python -m crpt.bench collect` computes, and that it runs."""

import json
import runpy
import sys

import pytest
import toy_env

from crpt.bench import collect as bench
from crpt.bench.collect import CollectArguments, Result


def result(**changes) -> Result:
    values = {
        "domains": ("a",),
        "render": "fast",
        "workers": 4,
        "transitions": 1000,
        "alone": {"a": (90.0, 110.0)},
        "steady": 380.0,
        "seconds": 2.7,
        "start_up": 1.0,
        "others": 0.0,
    }
    return Result(**{**values, **changes})


def test_the_ratio_is_that_to_n_environments_alone():
    one = result()
    assert one.ratio == pytest.approx(0.95)
    assert one.ideal == pytest.approx(2.5)
    two = result(domains=("a", "b"), alone={"a": (90, 110), "b": (25, 25)}, steady=None)
    assert two.ratio is None
    assert two.ideal == pytest.approx((10 + 40) / 4)
    assert bench._cells(one)[2:] == ["100", "10%", "4", "380", "0.95", "0.93", "1.00 s"]
    assert bench._cells(two)[2:6] == ["-", "-", "4", "-"]


def test_the_steady_rate_leaves_out_start_and_end():
    times = [(0.0, 1), (1.0, 10), (2.0, 200), (3.0, 500), (4.0, 800), (9.0, 1000)]
    assert bench._slope(times, 1000) == pytest.approx(300)
    assert bench._slope(times[-2:], 1000) == pytest.approx(40)


def test_a_machine_that_others_use_makes_no_claim():
    assert not any("NO CLAIM" in line for line in bench._notes([result(others=0.05)]))
    assert any("took up to 0.7 cores" in line for line in bench._notes([result(others=0.7)]))


def test_it_runs_and_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.envs, "make", toy_env.make)
    monkeypatch.setattr(bench.envs, "require_known", lambda domain: None)
    # The rate of its own needs no process here, and 2 ms a step are known.
    monkeypatch.setattr(bench, "_alone", lambda config, domain, seconds: 480.0)
    arguments = CollectArguments(
        domains=("slow_a", "slow_b"), render="fast", workers=2, seconds=0.5, episode_length=10
    )
    flags = ["--domains", *arguments.domains, "--render", "fast", "--workers", "2"]
    file = tmp_path / "figures.json"
    flags += ["--seconds", "0.5", "--episode-length", "10", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["crpt.bench", "collect", *flags])
    with pytest.raises(SystemExit) as ending:
        runpy.run_module("crpt.bench", run_name="__main__")
    assert ending.value.code == 0
    table = capsys.readouterr().out
    assert "slow_a, slow_b" in table
    document = json.loads(file.read_text())
    assert document["bench"] == "collect"
    single, _, together = document["rows"]
    assert single["transitions"] == 480
    assert 0.2 < single["ratio"] < 1.1
    assert together["ratio"] is None
    assert together["seconds"] > 0.2


def test_one_environment_alone_is_timed_in_its_own_process(monkeypatch):
    config = bench.CollectConfig(domains=("slow_a",), image_size=toy_env.SIZE)
    monkeypatch.setattr(bench.envs, "make", toy_env.make)
    assert 100 < bench._play(config, "slow_a", 0.2, 0) < 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0}, "seconds should be more than 0, got 0"),
        ({"workers": 0}, "workers should be auto or at least 1, got 0"),
        ({"episode_length": 0}, "episode_length should be at least 1, got 0"),
        ({"domains": ("cheeta_run",)}, "got 'cheeta_run'; close to it: cheetah_run"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_measured(changes, message):
    with pytest.raises(ValueError, match=message):
        bench.collect_command(CollectArguments(**changes))
