"""`python -m crpt.bench collect`: random play with N processes beside one environment alone.

The environment alone plays and renders the same episodes in a process of its own, writes nothing,
and has as many threads for a software renderer as each of the N has. It is timed before and after
the N, and its two rates are averaged. The steady rate is the slope of transitions over time between
20% and 80% of them: neither start-up nor the last episodes, which fewer processes play than there
are. Those are in a column of their own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from crpt import envs
from crpt.bench import machine
from crpt.bench.table import Column, Table, no_claim, significant
from crpt.bench.timing import OtherLoad
from crpt.collect.random_play import Player
from crpt.collect.workers import record_in_processes, render_threads
from crpt.config import CollectConfig
from crpt.files import replace_file
from crpt.replay import ReplayBuffer

SCHEMA = 1
DISTURBED = 0.1  # cores that others may take before a row's figures are marked
WARM_UP = 10  # steps
STEADY = (0.2, 0.8)  # of all transitions
COLUMNS = (
    Column("domains", 28, number=False),
    Column("render", 6, number=False),
    Column("alone", 7),
    Column("±", 4),
    Column("N", 3),
    Column("steady", 7),
    Column("ratio", 5),
    Column("to the end", 10),
    Column("start-up", 8),
)


@dataclass(frozen=True)
class CollectArguments:
    domains: tuple[str, ...] = ("cheetah_run", "quadruped_run")
    """Each by itself, then all together."""
    render: Literal["exact", "fast", "both"] = "both"
    """What to time: dm_control's own pixels, those without shadows and multisampling, or both."""
    workers: int | Literal["auto"] = "auto"
    """N; auto: one process per core."""
    seconds: float = 5.0
    """For one environment alone, and for the N processes in their steady state, about."""
    episode_length: int = 50
    """Agent steps per episode."""
    json: Path | None = None
    """Also write everything measured to this file."""
    markdown: bool = False
    """Print the table in Markdown."""


@dataclass(frozen=True)
class Result:
    """One line of the table. Rates are transitions a second."""

    domains: tuple[str, ...]
    render: str
    workers: int
    transitions: int
    """Of each domain."""
    alone: dict[str, tuple[float, float]]
    """Before and after."""
    steady: float | None
    """None for several domains: their rates differ."""
    seconds: float
    """From the first transition to the last."""
    start_up: float
    """Seconds to the first transition."""
    others: float | None
    """Cores that other processes took."""

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED

    @property
    def ideal(self) -> float:
        """Seconds that N environments alone would take, if they could share the work evenly."""
        return sum(self.transitions / float(np.mean(r)) for r in self.alone.values()) / self.workers

    @property
    def ratio(self) -> float | None:
        """Steady rate over N times the rate alone."""
        if self.steady is None:
            return None
        return self.steady / (self.workers * float(np.mean(self.alone[self.domains[0]])))


def collect_command(arguments: CollectArguments) -> int:
    """Random play with N processes beside one environment's own rate."""
    _check(arguments)
    table = Table(COLUMNS, arguments.markdown)
    described = machine.describe(torch.device("cpu"), "collect")
    _say([*table.text(machine.header(described)), "", *table.header()])
    results = []
    for result in measure(arguments):
        results.append(result)
        _say([table.line(_cells(result))])
    _say(["", *table.text(_notes(results))])
    if arguments.json is not None:
        rows = [asdict(r) | {"ratio": r.ratio, "to_the_end": r.ideal / r.seconds} for r in results]
        document = {"schema": SCHEMA, "bench": "collect", **described, "rows": rows}
        text = json.dumps(document, indent=1)
        replace_file(arguments.json, lambda path: path.write_text(text + "\n"))
    return 0


def measure(arguments: CollectArguments) -> Iterator[Result]:
    """A line per domain and way of rendering, then all domains together."""
    workers = arguments.workers
    if workers == "auto":
        workers = len(os.sched_getaffinity(0))
    for render in ("exact", "fast") if arguments.render == "both" else (arguments.render,):
        config = CollectConfig(
            domains=arguments.domains,
            render=render,
            episode_length=arguments.episode_length,
            workers=workers,
        )
        rates = {}
        for domain in arguments.domains:
            result = _measured(config, (domain,), arguments.seconds)
            rates[domain] = result.alone[domain]
            yield result
        if len(arguments.domains) > 1:
            yield _measured(config, arguments.domains, arguments.seconds, rates)


def _measured(
    config: CollectConfig,
    domains: tuple[str, ...],
    seconds: float,
    known: dict[str, tuple[float, float]] | None = None,
) -> Result:
    load = _Load()
    assert config.workers != "auto"
    before = known or {d: (_alone(config, d, seconds / 2),) * 2 for d in domains}
    # As many of each as take the asked-for time together, in whole episodes.
    whole = sum(1 / float(np.mean(rates)) for rates in before.values())
    episodes = max(round(config.workers * seconds / whole / (config.episode_length or 1)), 1)
    transitions = episodes * (config.episode_length or 1)
    config = CollectConfig(**{**asdict(config), "domains": domains, "transitions": transitions})
    times, start_up = _together(config)
    alone = known or {d: (before[d][0], _alone(config, d, seconds / 2)) for d in domains}
    return Result(
        domains,
        config.render,
        int(config.workers),
        transitions,
        alone,
        _slope(times, transitions) if len(domains) == 1 else None,
        times[-1][0] - times[0][0],
        start_up,
        load.cores(),
    )


def _together(config: CollectConfig) -> tuple[list[tuple[float, int]], float]:
    """(time, transitions) on the way, and the seconds to the first."""
    times: list[tuple[float, int]] = []

    def note(counts: dict[str, int]) -> None:
        count = sum(counts.values())
        if count > 0 and (not times or count != times[-1][1]):
            times.append((time.perf_counter(), count))

    with tempfile.TemporaryDirectory(prefix="crpt-bench-") as directory:
        dataset = Path(directory) / "dataset"
        ReplayBuffer.create(dataset, {})
        begun = time.perf_counter()
        record_in_processes(
            config,
            dataset,
            dict.fromkeys(config.domains, (0, 0)),
            workers=int(config.workers),
            seed=0,
            make_env=envs.make,
            on_progress=note,
        )
    return times, times[0][0] - begun


def _slope(times: list[tuple[float, int]], transitions: int) -> float:
    low, high = (share * transitions for share in STEADY)
    steady = [point for point in times if low <= point[1] <= high]
    if len(steady) < 3:
        steady = times
    seconds, counts = np.array(steady).T
    return float(np.polyfit(seconds - seconds[0], counts, 1)[0])


def _alone(config: CollectConfig, domain: str, seconds: float) -> float:
    """Transitions a second of one environment in a process of its own."""
    context = multiprocessing.get_context("spawn")
    threads = render_threads(int(config.workers))
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(_play, config, domain, seconds, threads).result()


def _play(config: CollectConfig, domain: str, seconds: float, threads: int) -> float:
    os.environ.setdefault("LP_NUM_THREADS", str(threads))
    player = Player(config, domain, seed=0, make_env=envs.make)
    steps = (step for episode in range(10**9) for step in player.play(episode))
    for _ in range(WARM_UP):
        next(steps)
    count, begun = 0, time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds:
        count += next(steps).action is not None
    player.close()
    return count / (now - begun)


class _Load:
    """Cores taken by others than this process and its children, all of which have ended."""

    def __init__(self) -> None:
        self._load, self._begun, self._children = OtherLoad(), time.monotonic(), _children()

    def cores(self) -> float | None:
        cores = self._load.cores()
        if cores is None:
            return None
        wall = time.monotonic() - self._begun
        return max(0.0, cores - (_children() - self._children) / wall)


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _check(arguments: CollectArguments) -> None:
    if not arguments.seconds > 0:
        raise ValueError(f"seconds should be more than 0, got {arguments.seconds:g}")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ValueError(f"json should be in a directory that exists, got {arguments.json}")
    CollectConfig(
        domains=arguments.domains,
        workers=arguments.workers,
        episode_length=arguments.episode_length,
    )
    for domain in arguments.domains:
        envs.require_known(domain)


def _cells(result: Result) -> list[str]:
    rates = list(result.alone.values())
    one = len(rates) == 1
    return [
        ", ".join(result.domains),
        f"{result.render} !" if result.disturbed else result.render,
        significant(float(np.mean(rates[0]))) if one else "-",
        f"{abs(rates[0][0] - rates[0][1]) / sum(rates[0]):.0%}" if one else "-",
        str(result.workers),
        significant(result.steady) if result.steady is not None else "-",
        f"{result.ratio:.2f}" if result.ratio is not None else "-",
        f"{result.ideal / result.seconds:.2f}",
        f"{result.start_up:.2f} s",
    ]


def _notes(results: list[Result]) -> list[str]:
    lines = [
        "alone: transitions a second of one environment, rendered and stepped in one process, "
        "resets included;",
        "  ±: half the difference of before and after. steady: of N processes that record; "
        "ratio: over N x alone.",
        "to the end: share of N x alone from the first transition to the last, with the last "
        "episodes, which are long",
        "  beside so short a run. start-up: seconds to the first transition.",
    ]
    disturbed = [result.others or 0.0 for result in results if result.disturbed]
    return lines + no_claim(disturbed, "rows")


def _say(lines: list[str]) -> None:
    print(*lines, sep="\n", flush=True)
