"""A table that grows line by line: aligned on a terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    heading: str
    width: int
    number: bool = True
    """To the right; words go to the left."""


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    markdown: bool = False

    def header(self) -> list[str]:
        headings = self.line([column.heading for column in self.columns])
        if self.markdown:
            rules = ("---:" if column.number else "---" for column in self.columns)
            return [headings, "|" + "|".join(rules) + "|"]
        return [headings, self.line(["-" * column.width for column in self.columns])]

    def line(self, cells: Sequence[str]) -> str:
        if self.markdown:
            return "| " + " | ".join(cells) + " |"
        parts = (
            cell.rjust(column.width) if column.number else cell.ljust(column.width)
            for cell, column in zip(cells, self.columns, strict=True)
        )
        return "  ".join(parts).rstrip()

    def text(self, lines: Sequence[str]) -> list[str]:
        """What stands above or below the table, as it is."""
        return ["```", *lines, "```"] if self.markdown else list(lines)


def significant(value: float) -> str:
    """Three digits, without an exponent: 0.0123, 1.23, 123, 1234."""
    if value <= 0:
        return "0"
    digits = max(0, 2 - _exponent(value))
    return f"{value:.{digits}f}"


def _exponent(value: float) -> int:
    return int(f"{value:.2e}".split("e")[1])


def no_claim(others: Sequence[float], what: str) -> list[str]:
    """The warning below a table whose marked rows others disturbed, by so many cores each; nothing
    if there are none."""
    if not others:
        return []
    return [
        f"WARNING: NO CLAIM: during the {what} marked ! other processes took up to "
        f"{max(others):.1f} cores. Repeat on an idle machine."
    ]
