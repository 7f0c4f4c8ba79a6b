"""How long a process has been silent, leaving out what is not its own doing."""

from __future__ import annotations

import time
from pathlib import Path

_PROC = Path("/proc")
_PATIENCE = 60.0
_PATIENCE_AT_START = 300.0  # for importing the simulator, compiling models and shaders
_SLOWEST_STEPS = 100
_LOOK_SECONDS = 0.5
_LONGEST_SLEEP = 2.0


class Watch:
    """The seconds for which a process could have gone on and did not.

    Not counted: while it waits for the parent (`pause`), for a free core (the machine is busy), or
    while the parent itself slept (the whole machine may have).
    """

    def __init__(self, pid: int) -> None:
        self.idle = 0.0
        self._tasks = _PROC / str(pid) / "task"
        self._starting = True
        self._running = False
        self._looked = time.monotonic()
        self._queued = 0.0

    def begin(self, *, new: bool) -> None:
        """It was given an episode; of an environment that it has to make, if `new`."""
        self._starting = self._starting or new
        self.resume()

    def has_progressed(self) -> None:
        self._starting = False
        self.resume()

    def resume(self) -> None:
        self.idle, self._running = 0.0, True

    def pause(self) -> None:
        self.idle, self._running = 0.0, False

    def patience(self, slowest_step: float) -> float:
        """Seconds of silence to bear: much longer than the slowest step that was seen."""
        if self._starting:
            return _PATIENCE_AT_START
        return max(_PATIENCE, _SLOWEST_STEPS * slowest_step)

    def has_stalled(self, patience: float) -> bool:
        """Whether it has been silent for longer than that. To be called about every second."""
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            queued = self._seconds_queued()
            awake = min(now - self._looked, _LONGEST_SLEEP) - max(queued - self._queued, 0.0)
            self._looked, self._queued = now, queued
            if self._running:
                self.idle += max(awake, 0.0)
        return self.idle > patience

    def _seconds_queued(self) -> float:
        """How long its threads have waited for a core so far."""
        seconds = 0.0
        try:
            for task in self._tasks.iterdir():
                # Nanoseconds run, nanoseconds waited, times run.
                seconds += int((task / "schedstat").read_text().split()[1]) * 1e-9
        except (OSError, IndexError, ValueError):
            return self._queued  # a thread that just ended, or a kernel that does not count
        return seconds
