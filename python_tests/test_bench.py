"""What all benches share: timing, limits, tables, the machine, the command line."""

import json
import os
import re
import runpy
import subprocess
import sys
import time

import pytest
import torch

from crpt.bench import machine
from crpt.bench.limits import Limits, Work, _gemms
from crpt.bench.table import Column, Table, significant
from crpt.bench.timing import OtherLoad, Side, summarise, take_turns, wait_until_idle

CPU = torch.device("cpu")


def test_median_quartiles_and_spread_of_known_times():
    timing = summarise([5.0, 1.0, 2.0, 4.0, 3.0], calls=7)
    assert (timing.lower, timing.median, timing.upper) == (2.0, 3.0, 4.0)
    assert (timing.rounds, timing.calls) == (5, 7)
    assert timing.spread == pytest.approx(1 / 3)


def test_sides_take_turns_and_walk_through_all_their_input_sets():
    log: list[tuple[str, int]] = []

    def side(name: str) -> Side:
        def call(i: int) -> None:
            log.append((name, i))
            time.sleep(2e-3)  # longer than a block should be: one call a block

        return Side(name, call, [(i,) for i in range(4)])

    timings = take_turns([side("ours"), side("theirs")], CPU, seconds=0.03)
    assert {t.calls for t in timings.values()} == {1}
    rounds = timings["ours"].rounds
    assert rounds == timings["theirs"].rounds >= 5
    turns = log[-2 * 2 * rounds :]  # a block is one call, and one before it that is not timed
    names = [name for name, _ in turns]
    per_round = [names[i : i + 4] for i in range(0, len(names), 4)]
    assert {tuple(x) for x in per_round} == {
        ("ours", "ours", "theirs", "theirs"),
        ("theirs", "theirs", "ours", "ours"),
    }
    for start, name in ((0, "ours"), (2, "theirs")):  # from another place each
        sets = [i for who, i in log if who == name]
        assert sets == [(start + i) % 4 for i in range(len(sets))]
    assert all(t.lower >= 2e-3 for t in timings.values())


def test_short_calls_are_timed_in_blocks():
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    timing = take_turns([Side("ours", call, [()])], CPU, seconds=0.01)["ours"]
    assert timing.calls > 1
    warm_up, one_more = 4 * 2, timing.rounds
    assert calls == warm_up + one_more + timing.rounds * timing.calls


def test_other_processes_are_seen_and_this_one_is_not():
    def spin(seconds: float) -> float:
        """Cores that this process had of a machine which may be busy."""
        begun, end = time.monotonic(), time.process_time() + seconds
        while time.process_time() < end:
            pass
        return seconds / (time.monotonic() - begun)

    others = OtherLoad()
    if others.cores() is None:
        pytest.skip("no /proc/stat")
    own = spin(0.5)
    alone = others.cores()
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        others = OtherLoad()
        time.sleep(0.5)
        beside = others.cores()
    finally:
        hog.kill()
        hog.wait()
    assert beside > 0.2
    # What the spinning process took itself is not among the others.
    assert alone <= os.cpu_count() - 0.3 * own


def test_waiting_ends_when_others_are_idle_or_patience_does(monkeypatch):
    loads = iter([0.9, 0.8, 0.05])
    monkeypatch.setattr(OtherLoad, "cores", lambda self: next(loads))
    wait_until_idle(0.1, patience=60.0, window=0.0)
    assert next(loads, None) is None
    looks: list[float] = []
    monkeypatch.setattr(OtherLoad, "cores", lambda self: looks.append(0.9) or 0.9)
    begun = time.monotonic()
    wait_until_idle(0.1, patience=0.05, window=0.02)
    assert time.monotonic() - begun >= 0.05
    assert 1 <= len(looks) <= 4  # each takes 0.02 s at least
    monkeypatch.setattr(OtherLoad, "cores", lambda self: pytest.fail("looked without patience"))
    wait_until_idle(0.1, patience=0.0)


def test_the_limit_is_the_larger_of_copy_and_gemm():
    limits = Limits(CPU)
    copying, multiplying = Work(10**6), Work(10**6, 10**9)
    times = {"copy": summarise([2e-3] * 3, 1), "gemm": summarise([4e-3] * 3, 1)}

    cached = limits.sides(copying, cached=True)
    assert [side.name for side in cached] == ["copy"]
    limit = limits.of(copying, cached, times)
    assert (limit.seconds, limit.bound, limit.rate) == (2e-3, "copy", None)
    assert limit.bandwidth == 10**6 / 2e-3

    sides = limits.sides(multiplying, cached=False)
    assert [side.name for side in sides] == ["copy", "gemm"]
    limit = limits.of(multiplying, sides, times)
    n = sides[1].sets[0][0].shape[0]
    assert limit.rate == 2 * n**3 / 4e-3
    assert (limit.seconds, limit.bound) == (10**9 / limit.rate, "GEMM")
    # From memory: a copy that no cache holds.
    moved = 2 * sides[0].sets[0][0].nbytes
    assert moved >= 2 * machine.last_level_cache(CPU)
    assert limit.bandwidth == moved / 2e-3


@pytest.mark.parametrize("name", _gemms(CPU))
def test_every_gemm_is_one(name):
    a, b = torch.randn(2, 5, 5)
    out = _gemms(CPU)[name](a, b)
    assert torch.allclose(out, a @ b, atol=1e-5) or torch.allclose(out, a @ b.T, atol=1e-5)


def test_three_digits_without_an_exponent():
    values = (0, 0.00123, 0.0864, 0.995, 0.9996, 1.234, 12.34, 99.96, 123.4, 9876.5)
    assert [significant(v) for v in values] == [
        "0", "0.00123", "0.0864", "0.995", "1.00", "1.23", "12.3", "100", "123", "9876",
    ]  # fmt: skip


def test_a_table_on_the_terminal_and_in_markdown():
    columns = (Column("name", 6, number=False), Column("ms", 5))
    assert [*Table(columns).header(), Table(columns).line(["knn", "1.23"])] == [
        "name       ms",
        "------  -----",
        "knn      1.23",
    ]
    markdown = Table(columns, markdown=True)
    assert [*markdown.header(), markdown.line(["knn", "1.23"])] == [
        "| name | ms |",
        "|---|---:|",
        "| knn | 1.23 |",
    ]
    assert markdown.text(["a note"]) == ["```", "a note", "```"]
    with pytest.raises(ValueError, match="zip"):
        Table(columns).line(["knn"])


def test_the_machine_as_plain_values(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crpt.bench", "ops", "--only", "a b"])
    described = machine.describe(CPU, "ops")
    assert json.loads(json.dumps(described)) == described
    assert described["command"] == "python -m crpt.bench ops --only 'a b'"
    assert described["cpu"]["threads"] == torch.get_num_threads() == 1
    assert described["cpu"]["kernels"] in ("baseline", "avx2", "avx512", "amx")
    assert described["versions"]["torch"] == torch.__version__
    text = "\n".join(machine.header(described))
    assert described["cpu"]["model"] in text
    assert "1 thread," in text


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run `python -m crpt.bench` in this process: exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crpt.bench", *arguments])
        with pytest.raises(SystemExit) as exit:
            runpy.run_module("crpt.bench", run_name="__main__")
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


def test_help_lists_the_benches_and_their_flags(bench):
    code, out, _ = bench("--help")
    assert code == 0
    assert re.search(r"^  ops +Every operator", out, re.MULTILINE)
    code, out, _ = bench("ops", "--help")
    assert code == 0
    for flag in ("--device", "--json", "--markdown", "--only", "--no-compile", "--seconds"):
        assert flag in out


def test_no_bench_or_an_unknown_one_shows_the_usage(bench):
    assert bench()[0] == 2
    code, _, err = bench("oops")
    assert code == 2
    assert "bench should be ops" in err
    assert "got oops" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "device should be cpu, or a cuda device"),
        (("--only", "nothing such"), "only should find one of these, got nothing such:"),
        (("--only", "("), "only should be a regular expression"),
        (("--seconds", "0"), "seconds should be more than 0, got 0"),
        (("--json", "no/such/directory/file"), "json should be in a directory that exists"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_measured(bench, arguments, message):
    code, out, err = bench("ops", *arguments)
    assert code == 1
    assert message in err
    assert out == ""
