"""Time several sides of one comparison in turns, and see who else used the processor."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Inputs = tuple[Any, ...]
Clock = Callable[[Callable[[], None]], float]  # seconds that the block takes

# A block of calls should last this long: far above what the clock resolves.
BLOCK_SECONDS = {"cpu": 1e-3, "cuda": 5e-3}
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200


@dataclass(frozen=True)
class Side:
    """One of those compared: a function, and the input sets that it is called on in rotation."""

    name: str
    call: Callable[..., object]
    sets: Sequence[Inputs]


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over rounds: median and quartiles."""

    median: float
    lower: float
    upper: float
    rounds: int
    calls: int
    """In a row, in every round; a round's time is their mean."""

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, over the median."""
        return (self.upper - self.lower) / 2 / self.median


def summarise(seconds: Sequence[float], calls: int) -> Timing:
    """Median and quartiles of one side's rounds."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper, len(seconds), calls)


def clock(device: torch.device) -> Clock:
    """The wall clock, or on a GPU the events before and after the block."""
    return _events if device.type == "cuda" else _wall


def _wall(block: Callable[[], None]) -> float:
    begun = time.perf_counter()
    block()
    return time.perf_counter() - begun


def _events(block: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    block()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def take_turns(sides: Sequence[Side], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Each side's block, once a round, round after round for about `seconds` after warming up.

    Drift of the machine so hits all sides; the order within a round is random, as each side leaves
    the caches and threads otherwise to the next. Each walks through its input sets from another
    place: when it comes to a set, all sides have passed over the others since.
    """
    measure, order = clock(device), random.Random(0)
    walks = [_Walk(side, i * len(side.sets) // len(sides), measure) for i, side in enumerate(sides)]
    with _no_collection():
        for walk in walks:
            walk.warm_up(BLOCK_SECONDS[device.type])
        a_round = sum((1 + walk.calls) * walk.estimate for walk in walks)
        for _ in range(min(max(int(seconds / a_round), FEWEST_ROUNDS), MOST_ROUNDS)):
            for walk in order.sample(walks, len(walks)):
                walk.seconds.append(walk.block(walk.calls))
    return {walk.side.name: summarise(walk.seconds, walk.calls) for walk in walks}


@dataclass
class _Walk:
    """A side on its way through its input sets."""

    side: Side
    position: int
    measure: Clock
    calls: int = 1
    estimate: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def warm_up(self, block_seconds: float) -> None:
        self.block(1)
        self.estimate = max(min(self.block(1) for _ in range(3)), 1e-9)
        self.calls = min(max(round(block_seconds / self.estimate), 1), 1000)

    def block(self, calls: int) -> float:
        """Seconds a call, over `calls` calls in a row."""
        call, sets = self.side.call, self.side.sets
        # One more, not timed: it finds code and threads as the sides before left them.
        inputs = [sets[(self.position + i) % len(sets)] for i in range(1 + calls)]
        self.position += len(inputs)
        call(*inputs[0])

        def run() -> None:
            for x in inputs[1:]:
                call(*x)

        return self.measure(run) / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class OtherLoad:
    """Cores that other processes, and the host of a virtual machine, keep from this one.

    Since it was made: all CPU time of /proc/stat but this process's own; None without /proc.
    """

    # user, nice, system, irq, softirq, steal
    _BUSY = (0, 1, 2, 5, 6, 7)

    def __init__(self) -> None:
        self._all, self._own, self._wall = self._total(), time.process_time(), time.monotonic()

    def cores(self) -> float | None:
        now = self._total()
        if now is None or self._all is None:
            return None
        own, wall = time.process_time() - self._own, time.monotonic() - self._wall
        return max(0.0, (now - self._all - own) / wall)

    def _total(self) -> float | None:
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        return sum(int(words[i]) for i in self._BUSY) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(cores: float, patience: float, *, window: float = 0.3) -> None:
    """Until others take fewer cores than that for a moment, or `patience` seconds have passed."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        load = OtherLoad()
        time.sleep(window)
        if (load.cores() or 0.0) <= cores:
            return
