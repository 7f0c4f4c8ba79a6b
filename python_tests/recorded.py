"""Updates that are recorded and replayed, on a CPU: what a CUDA graph does with functions alone."""

from __future__ import annotations

from collections.abc import Callable


class Emulated:
    """Recording computes nothing, and replaying does the work: as CUDA graphs, without a GPU."""

    def __init__(self) -> None:
        self.done_aside = 0
        self.replays = 0

    def aside(self, work: Callable[[], None]) -> None:
        self.done_aside += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            work()

        return replay
