"""What `python -m crpt.bench replay` compares and computes, and that it runs."""

import importlib.metadata
import json
import runpy
import sys

import numpy as np
import pytest

from crpt.bench import replay as bench
from crpt.bench import replay_measure, replay_sampling, usual_replay
from crpt.bench import replay_report as report
from crpt.bench.replay_measure import Measure, Target
from crpt.bench.replay_writers import random_steps, writer_processes
from crpt.bench.timing import Timing
from crpt.bench.usual_replay import Transitions
from crpt.dataset import verify
from crpt.replay import DomainSpec, ReplayBuffer

SPEC = DomainSpec(capacity=200, action_shape=(2,), frame_shape=(3, 8, 8))


def timing(median: float, spread: float = 0.0) -> Timing:
    return Timing(median, median * (1 - spread), median * (1 + spread), 5, 1)


def test_the_usual_buffers_are_given_stacks_that_repeat_the_first_frame():
    steps = random_steps(SPEC, 5)
    t = Transitions.of(steps, 3)
    assert len(t) == 5
    for i in range(5):
        for stack, end in ((t.obs[i], i), (t.next_obs[i], i + 1)):
            frames = [steps.frames[max(end - back, 0)] for back in (2, 1, 0)]
            assert np.array_equal(stack, np.concatenate(frames))
    assert t.dones.tolist() == [0, 0, 0, 0, 1]
    assert np.array_equal(t.rewards, steps.rewards[1:])


@pytest.mark.parametrize("usual", usual_replay.EVERY, ids=lambda usual: usual.name)
def test_the_usual_buffers_hold_what_they_are_given(usual):
    if usual not in usual_replay.installed()[0]:
        pytest.skip(f"{usual.name} is not installed")
    t = Transitions.of(random_steps(SPEC, 20), 3)
    buffer = usual(40, t)
    buffer.append(t)
    if isinstance(buffer, usual_replay.UsualOfMany):
        buffer.extend(t)
    sample = buffer.sample(64)
    seen = sample.observations if hasattr(sample, "observations") else sample["obs"]
    known = {row.tobytes() for row in t.obs}
    assert {np.asarray(row).tobytes() for row in seen} <= known
    assert buffer.nbytes() >= 40 * 2 * 9 * 8 * 8


def test_a_package_that_is_missing_is_told_and_left_out(monkeypatch):
    version = importlib.metadata.version

    def missing(name: str) -> str:
        if name == "cpprb":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(usual_replay.importlib.metadata, "version", missing)
    found, lines = usual_replay.installed()
    assert usual_replay.Cpprb not in found
    told = [line for line in lines if line.startswith("cpprb is not installed")]
    assert told == [
        "cpprb is not installed: its rows are left out; pip install '.[bench]' brings it"
    ]


def test_ratios_say_how_many_times_better_ours_is():
    less = Measure("sampling", "ms", {"ours": timing(2), "cpprb": timing(6)})
    assert less.ratio("cpprb") == 3
    sides = {"ours": timing(600, 0.1), "cpprb": timing(200)}
    more = Measure("writing", "transitions/s", sides, (), more_is_better=True, others=0.3)
    assert more.ratio("cpprb") == 3
    assert report.cells(more) == [
        ["writing !", "ours", "600", "transitions/s", "10%", ""],
        ["", "cpprb", "200", "transitions/s", "0%", "3.00 x"],
    ]
    assert json.loads(json.dumps(report.plain(more)))["ours_is"] == {"cpprb": 3}


def test_targets_are_met_or_missed_and_a_busy_machine_makes_no_claim():
    targets = (
        Target("writing, x cpprb", 3.2, 3),
        Target("bytes", 1.06, 1.05, at_most=True),
    )
    measure = Measure("m", "ms", {"ours": timing(1)}, targets, others=0.7)
    lines = report.notes([measure])
    assert "met     writing, x cpprb: 3.2 (>= 3)" in lines
    assert "MISSED  bytes: 1.06 (<= 1.05)" in lines
    assert any("NO CLAIM" in line and "took up to 0.7 cores" in line for line in lines)
    quiet = Measure("m", "ms", {"ours": timing(1)}, targets, others=0.05)
    assert not any("NO CLAIM" in line for line in report.notes([quiet]))


def test_rates_and_milliseconds_from_seconds_a_call():
    calls = []
    side = bench.Side("ours", lambda: calls.append(bench.time.sleep(2e-3)), [()])
    rate = replay_measure.timed("writing", "transitions/s", [side], 0.02, rate=100)
    assert rate.more_is_better
    assert 1_000 < rate.sides["ours"].median <= 50_000
    assert rate.sides["ours"].lower <= rate.sides["ours"].median <= rate.sides["ours"].upper
    assert replay_measure.timed("sampling", "ms", [side], 0.02).sides["ours"].median >= 2


def test_a_sparse_dataset_is_a_whole_one_that_takes_no_room(tmp_path):
    bench.sparse_dataset(tmp_path / "ds", 2_000)
    buffer = ReplayBuffer.open(tmp_path / "ds")
    assert buffer.num_transitions(bench.DOMAIN) == 2_000
    assert len(buffer.episodes(bench.DOMAIN)) == 4
    frames = tmp_path / "ds" / bench.DOMAIN / "frames.npy"
    assert frames.stat().st_size > 2_000 * 21_168 > 100 * frames.stat().st_blocks * 512
    (checked,) = verify(tmp_path / "ds")
    assert checked.problems == []


def test_what_is_sampled_is_checked_first(monkeypatch):
    buffer = bench.random_pixels(200, 3, image_size=8)
    replay_sampling._check(buffer, bench.DOMAIN)
    gather = ReplayBuffer.gather

    def wrong(self, *arguments, **more):
        batch = gather(self, *arguments, **more)
        batch.next_obs[3, 4, 2, 2] ^= 1
        return batch

    monkeypatch.setattr(ReplayBuffer, "gather", wrong)
    with pytest.raises(RuntimeError, match="next_obs should be the stacked frames"):
        replay_sampling._check(buffer, bench.DOMAIN)


def test_writer_processes_write_as_fast_as_asked():
    buffer = ReplayBuffer.create(None, {"toy": SPEC})
    with writer_processes(2, buffer, "toy", 10) as writers:
        before = buffer.cursor("toy")
        assert before > 0
        for writer in writers:
            writer.start("extend", 0.05)
        wrote = [writer.wait() for writer in writers]
        written = sum(w.transitions for w in wrote)
        # Ten transitions are eleven steps; a ticket is lost where one overtakes the other.
        assert buffer.cursor("toy") - before >= written * 11 // 10
        writers[0].start("append", 0.3, 500.0)
        paced = writers[0].wait()
        assert 100 < paced.rate < 550
        assert paced.cpu < 0.3
    spawned = [writer.process for writer in writers]
    assert not any(process.is_alive() for process in spawned)


@pytest.mark.slow  # fills every buffer that is installed
def test_it_runs_and_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    flags = ["--transitions", "512", "--seconds", "0.05", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["crpt.bench", "replay", *flags])
    with pytest.raises(SystemExit) as ending:
        runpy.run_module("crpt.bench", run_name="__main__")
    assert ending.value.code == 0
    printed = capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document["bench"] == "replay"
    whats = [row["what"] for row in document["rows"]]
    assert [w for w in whats if w.startswith("sampling 512")] == [
        "sampling 512, uint8", "sampling 512, shifted, float32",
        "sampling 512, uint8, malloc keeps",
    ]  # fmt: skip
    for what in whats:
        assert what in printed
    assert document["rows"][0]["targets"][0]["met"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transitions": 511}, "transitions should be at least 512, got 511"),
        ({"seconds": 0}, "seconds should be more than 0, got 0"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_measured(changes, message):
    with pytest.raises(ValueError, match=message):
        bench.replay_command(bench.ReplayArguments(**changes))
