"""What `python -m crpt.bench replay` says of its measurements: table, targets, JSON."""

from __future__ import annotations

import dataclasses

from crpt.bench.replay_measure import Measure
from crpt.bench.table import Column, no_claim, significant

COLUMNS = (
    Column("what", 34, number=False),
    Column("side", 18, number=False),
    Column("figure", 9),
    Column("unit", 14, number=False),
    Column("±", 4),
    Column("ours is", 8),
)


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
        *(remark for result in results for remark in result.remarks),
        "",
        *(str(target) for result in results for target in result.targets),
    ]
    disturbed = [result.others or 0.0 for result in results if result.disturbed]
    return lines + no_claim(disturbed, "measures")


def plain(result: Measure) -> dict[str, object]:
    """Everything, as plain values."""
    return {
        **dataclasses.asdict(result),
        "targets": [dataclasses.asdict(t) | {"met": t.met} for t in result.targets],
        "ours_is": {name: result.ratio(name) for name in result.sides if name != "ours"},
    }
