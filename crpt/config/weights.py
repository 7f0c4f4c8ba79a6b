"""Weights of the domains: what they may be, and their exact proportion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def in_lowest_terms(weights: Sequence[float]) -> tuple[int, ...]:
    """Integers in the proportion of the numbers as they are written: of 0.1 and 0.3, 1 and 3."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    return tuple(weight // divisor for weight in whole)


def check_weights(
    weights: Sequence[float], domains: Sequence[str], places: int, place: str
) -> None:
    """ValueError unless there are none; or one for each of the domains, each of which
    gets one of so many places: turns of a run, or rows of a mixed batch."""
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ValueError(f"weights should be finite and greater than 0, got {list(weights)}")
    if not weights:
        return
    if len(weights) != len(domains):
        raise ValueError(
            "weights should be one number for each of domains, in their order, got "
            f"{len(weights)} weights and {len(domains)} domains"
            + ("" if domains else "; name the domains, too")
        )
    exact = in_lowest_terms(weights)
    least = min(exact)
    if places * least < sum(exact):
        raise ValueError(
            f"weights should leave every domain at least one {place}, of which there are {places}, "
            f"got {list(weights)}, by which {domains[exact.index(least)]} has "
            f"{places * least / sum(exact):.2g}"
        )
