"""What `python -m crpt.bench replay` says of its measurements: table, targets, JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from crpt.bench.table import Column, significant
from crpt.bench.timing import Timing

DISTURBED = 0.1  # cores that others may take before a measure's figures are marked
COLUMNS = (
    Column("what", 34, number=False),
    Column("side", 18, number=False),
    Column("figure", 9),
    Column("unit", 14, number=False),
    Column("±", 4),
    Column("ours is", 8),
)


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

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED

    def ratio(self, side: str) -> float:
        """How many times better ours is."""
        ours, theirs = self.sides["ours"].median, self.sides[side].median
        return ours / theirs if self.more_is_better else theirs / ours


def cells(result: Measure) -> list[list[str]]:
    """The table's lines."""
    lines = []
    for name, timing in result.sides.items():
        first = name == "ours"
        lines.append(
            [
                (f"{result.what} !" if result.disturbed else result.what) if first else "",
                name,
                significant(timing.median),
                result.unit,
                f"{timing.spread:.0%}",
                "" if first else f"{result.ratio(name):.2f} x",
            ]
        )
    return lines


def notes(results: list[Measure]) -> list[str]:
    """What the words mean, and which targets are met."""
    lines = [
        "Medians; ±: half the distance of the quartiles. ours is: times faster or smaller than "
        "that side.",
        "The usual chain: numpy gathers the stacks, then float32, replicate-pad, and a crop for "
        "each sample.",
        "",
        *(str(target) for result in results for target in result.targets),
    ]
    disturbed = [result.others or 0.0 for result in results if result.disturbed]
    if disturbed:
        lines.append(
            "WARNING: NO CLAIM: during the measures marked ! other processes took up to "
            f"{max(disturbed):.1f} cores. Repeat on an idle machine."
        )
    return lines


def plain(result: Measure) -> dict[str, object]:
    """Everything, as plain values."""
    return {
        **dataclasses.asdict(result),
        "targets": [dataclasses.asdict(t) | {"met": t.met} for t in result.targets],
        "ours_is": {name: result.ratio(name) for name in result.sides if name != "ours"},
    }
