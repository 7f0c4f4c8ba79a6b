"""Seconds of an update's phases, as it is written and as it is replayed by a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Phases = dict[str, float]
"""Seconds of each phase of one update."""


class Stopwatch:
    """Seconds from each phase's end to the next one's, all work on the device included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.phases: Phases = {}
        self._since = self._now()

    def passed(self, phase: str) -> None:
        now = self._now()
        self.phases[phase], self._since = now - self._since, now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class ReplayClock:
    """Times updates in a row, which do not wait for each other, and the phases of the last one by
    events that are recorded along with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: dict[str, Any] = {}

    def passed(self, phase: str) -> None:
        """At the end of a phase, while an update is recorded."""
        if phase not in self._events or not torch.cuda.is_current_stream_capturing():
            self._events[phase] = _event()
        self._events[phase].record()

    def time(self, update: Callable[[], object], repeats: int) -> Phases:
        """Of one update; `rest` is what no phase accounts for: draws, launches, results kept."""
        torch.cuda.synchronize(self._device)
        since = time.perf_counter()
        for _ in range(repeats):
            begin = _event()
            begin.record()
            update()
        torch.cuda.synchronize(self._device)
        seconds = (time.perf_counter() - since) / repeats
        phases: Phases = {}
        for phase, event in self._events.items():
            phases[phase] = begin.elapsed_time(event) / 1e3
            begin = event
        return {**phases, "rest": max(0.0, seconds - sum(phases.values()))}


def _event() -> Any:
    # external: part of the graph that is recorded, where one is.
    return torch.cuda.Event(enable_timing=True, external=True)
