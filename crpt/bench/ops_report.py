"""What `python -m crpt.bench ops` says of its measurements: table, notes, JSON."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from crpt.bench.limits import Limit
from crpt.bench.ops_rows import Row
from crpt.bench.table import Column, significant
from crpt.bench.timing import Timing

SCHEMA = 1
THEIRS = ("twin", "compile", "usual")
# Cores that others may take before a row's figures are marked.
DISTURBED = 0.1
# Inputs that are not meant to be in the caches.
FROM_MEMORY = ("cold", "part")
# 120 columns wide.
COLUMNS = (
    Column("operator", 14, number=False),
    Column("size", 18, number=False),
    Column("dtype", 5, number=False),
    Column("inputs", 6, number=False),
    Column("ours", 6),
    Column("±", 4),
    Column("twin", 6),
    Column("compile", 7),
    Column("usual", 6),
    Column("×twin", 5),
    Column("×compile", 8),
    Column("×usual", 6),
    Column("limit", 5),
)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    row: Row
    inputs: str
    sides: dict[str, Timing]
    limit: Limit | None = None
    sets: int = 1
    others: float | None = None
    usual_difference: float | None = None
    wrong: str = ""
    """Why there are no figures."""

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster ours is."""
        ours = self.sides["ours"].median
        return {k: self.sides[k].median / ours for k in THEIRS if k in self.sides}

    @property
    def fraction(self) -> float | None:
        """Achieved fraction of the limit."""
        return self.limit.seconds / self.sides["ours"].median if self.limit else None

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED


def cells(result: Result) -> list[str]:
    """The table's line."""
    row, sides = result.row, result.sides
    if result.wrong:
        figures = len(COLUMNS) - 4
        return [row.operator, row.size, row.dtype_name, "WRONG", *["-"] * figures]
    ratios = result.ratios
    return [
        row.operator,
        row.size,
        row.dtype_name,
        f"{result.inputs} !" if result.disturbed else result.inputs,
        significant(sides["ours"].median * 1e3),
        f"{sides['ours'].spread:.0%}",
        *(significant(sides[k].median * 1e3) if k in sides else "-" for k in THEIRS),
        *(significant(ratios[k]) if k in ratios else "-" for k in THEIRS),
        f"{result.fraction:.0%}" if result.fraction is not None else "-",
    ]


def notes(results: list[Result], described: dict[str, Any]) -> list[str]:
    """What the table's words mean, and whether its figures can be relied on."""
    names = {result.row.operator: result.row.usual.name for result in results}
    gradients = dict.fromkeys(r.row.operator for r in results if r.row.backward)
    lines = [
        "ours, twin, compile, usual: median ms a call; ±: half the distance of ours' quartiles.",
        "×: times faster than the twin (crpt.ops.reference), torch.compile of it, and the usual:",
        *(f"  {operator}: {name}" for operator, name in names.items()),
        *_limits(results, described),
        "cold: inputs from memory. warm: inputs in the caches, as within an update; held against "
        "a copy there.",
    ]
    part = [result.sets for result in results if result.inputs == "part"]
    if part:
        lines.append(
            f"part: as cold, but {max(part)} sets of inputs are less than twice the cache: some "
            "may be found there."
        )
    if any(result.inputs == "graph" for result in results):
        lines.append(
            "graph: ours in a CUDA graph, the others not; on inputs as warm where those are."
        )
    if gradients:
        lines.append(f"Forward and backward: {', '.join(gradients)}.")
    lines.append(f"This took {described['seconds']:.0f} s.")
    disturbed = [result for result in results if result.disturbed]
    if disturbed:
        most = max(result.others or 0.0 for result in disturbed)
        lines.append(
            f"WARNING: NO CLAIM: during the rows marked ! other processes took up to {most:.1f} "
            "cores. Repeat on an idle machine."
        )
    for result in results:
        if result.wrong:
            lines.append(f"ERROR: {result.row.name} was not timed: {result.wrong}")
    return lines


def _limits(results: list[Result], described: dict[str, Any]) -> list[str]:
    limits = [result.limit for result in results if result.limit and result.inputs in FROM_MEMORY]
    if not limits:
        return []
    reached = f"copy_ {statistics.median(x.bandwidth for x in limits) / 1e9:.0f} GB/s"
    rates = [x.rate for x in limits if x.rate]
    if rates:
        gflops = statistics.median(rates) / 1e9
        reached += f", float32 GEMM {gflops:.0f} GFLOP/s ({described['gemm']})"
    return [
        "limit: share reached of moving inputs and results once at copy_'s bandwidth, or of the "
        "row's GEMMs",
        "at the best GEMM's rate, whichever takes longer; both are timed in turns with the row:",
        f"  {reached}, medians.",
    ]


def document(described: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "schema": SCHEMA,
        "bench": "ops",
        **described,
        "rows": [
            {
                "operator": result.row.operator,
                "size": result.row.size,
                "dtype": result.row.dtype_name,
                "inputs": result.inputs,
                "input_sets": result.sets,
                "backward": result.row.backward,
                "wrong": result.wrong or None,
                "seconds": {k: dataclasses.asdict(t) for k, t in result.sides.items()},
                "usual": result.row.usual.name,
                "usual_difference": result.usual_difference,
                "times_faster_than": result.ratios if result.sides else {},
                "work": dataclasses.asdict(result.row.work),
                "limit": dataclasses.asdict(result.limit) if result.limit else None,
                "fraction_of_limit": result.fraction,
                "cores_taken_by_others": result.others,
            }
            for result in results
        ],
    }
