"""What this machine can do at most: a copy's bandwidth and a GEMM's rate, timed in turns with the
rows that are held against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from crpt.bench.machine import last_level_cache
from crpt.bench.timing import Side, Timing, take_turns

_CHOICE_SECONDS = 0.3
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """What a problem cannot do without: its inputs read once, its results written once, its matrix
    products."""

    moved: int
    """Bytes."""
    flops: int = 0


@dataclass(frozen=True)
class Limit:
    """The larger of moved / bandwidth and flops / rate."""

    seconds: float
    bound: str
    """copy or GEMM: which of the two."""
    bandwidth: float
    """Bytes read and written a second by `copy_`."""
    rate: float | None
    """Operations a second of the best float32 GEMM; None where the work has none."""


class Limits:
    """The limits of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        n = _GEMM_SIZE[device.type]
        self._gemm_flops = 2 * n**3
        factors = [tuple(torch.randn(n, n, device=device) for _ in range(2))]
        gemms = [Side(name, gemm, factors) for name, gemm in _gemms(device).items()]
        timings = take_turns(gemms, device, _CHOICE_SECONDS)
        best = min(gemms, key=lambda side: timings[side.name].median)
        self.gemm_name = best.name
        """Which of torch's ways to a product is the fastest here."""
        self._gemm = Side("gemm", best.call, factors)
        self._copy = _copy(4 * last_level_cache(device), device)

    def sides(self, work: Work, *, cached: bool) -> list[Side]:
        """What is to be timed beside the work. cached: the problem stays in the caches, and so does
        the copy that it is held against.

        On a GPU that copy is from memory all the same: so short a one would measure its launch.
        """
        small = cached and self.device.type == "cpu"
        copy = _copy(work.moved, self.device) if small else self._copy
        return [copy, self._gemm] if work.flops else [copy]

    def of(self, work: Work, sides: list[Side], timings: Mapping[str, Timing]) -> Limit:
        """From the sides and what they took."""
        bandwidth = 2 * sides[0].sets[0][0].nbytes / timings["copy"].median
        rate = self._gemm_flops / timings["gemm"].median if work.flops else None
        copy, product = work.moved / bandwidth, work.flops / rate if rate else 0.0
        return Limit(max(copy, product), "copy" if copy >= product else "GEMM", bandwidth, rate)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best GEMM in that dtype."""
    n = _GEMM_SIZE[device.type]
    factors = [tuple(torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))]
    ways = _gemms(device) if dtype == torch.float32 else {"torch.matmul": torch.matmul}
    sides = [Side(name, gemm, factors) for name, gemm in ways.items()]
    timings = take_turns(sides, device, _CHOICE_SECONDS)
    return 2 * n**3 / min(timing.median for timing in timings.values())


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy from memory."""
    side = _copy(max(4 * last_level_cache(device), 1 << 28), device)
    timing = take_turns([side], device, _CHOICE_SECONDS)["copy"]
    return 2 * side.sets[0][0].nbytes / float(timing.median)


def _copy(moved: int, device: torch.device) -> Side:
    """A copy that reads and writes so many bytes together."""
    source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=device)
    return Side("copy", torch.empty_like(source).copy_, [(source,)])


def _gemms(device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """torch's ways to a @ b or a @ b.T; on a CPU the two can be different libraries."""
    found: dict[str, Callable[..., torch.Tensor]] = {"torch.matmul": torch.matmul}
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):

        def onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
            return out

        found["oneDNN's linear"] = onednn
    return found
