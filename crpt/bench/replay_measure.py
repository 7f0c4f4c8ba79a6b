"""One measure of `python -m crpt.bench replay`: sides in turns, and what ours should reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from crpt.bench.timing import OtherLoad, Side, Timing, take_turns

DISTURBED = 0.1  # cores that others may take before a measure's figures are marked


@dataclass(frozen=True)
class Target:
    """What ours should reach."""

    what: str
    reached: float
    wanted: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        state = "met   " if self.met else "MISSED"
        return f"{state}  {self.what}: {self.reached:,.4g} ({sign} {self.wanted:,.4g})"


@dataclass(frozen=True)
class Measure:
    """Some lines of the table, ours first."""

    what: str
    unit: str
    sides: dict[str, Timing]
    """Figures in the unit."""
    targets: tuple[Target, ...] = ()
    more_is_better: bool = False
    others: float | None = None
    """Cores that other processes took."""
    remarks: tuple[str, ...] = ()
    """What else is to be known of the figures."""

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED

    def ratio(self, side: str) -> float:
        """How many times better ours is."""
        ours, theirs = self.sides["ours"].median, self.sides[side].median
        return ours / theirs if self.more_is_better else theirs / ours


def undisturbed(retries: int, measured: Callable[..., Measure], *arguments: object) -> Measure:
    """Measured until nobody else takes processor time; otherwise where others took least."""
    tries = [measured(*arguments)]
    while tries[-1].disturbed and len(tries) <= retries:
        tries.append(measured(*arguments))
    return min(tries, key=lambda result: result.others or 0.0)


def timed(what: str, unit: str, sides: Sequence[Side], seconds: float, *, rate: int = 0) -> Measure:
    """Milliseconds a call; with a rate: so many a call, per second."""
    load = OtherLoad()
    timings = take_turns(sides, torch.device("cpu"), seconds)
    others = load.cores()
    convert: Callable[[float], float] = (lambda s: rate / s) if rate else (lambda s: s * 1e3)
    converted = {name: _convert(timing, convert) for name, timing in timings.items()}
    return Measure(what, unit, converted, (), rate > 0, others)


def _convert(timing: Timing, convert: Callable[[float], float]) -> Timing:
    lower, upper = sorted((convert(timing.lower), convert(timing.upper)))
    return dataclasses.replace(timing, median=convert(timing.median), lower=lower, upper=upper)


def exact(value: float) -> Timing:
    return Timing(value, value, value, 1, 1)
