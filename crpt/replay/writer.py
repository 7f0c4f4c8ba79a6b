"""Appends episodes to one domain."""

from __future__ import annotations

import os
import time
import weakref
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crpt.replay.core import RingWriter
from crpt.replay.errors import DatasetFullError
from crpt.replay.store import Store

WhenFull = Literal["overwrite", "grow"]
# Readers look for milliseconds at steps that they counted and that are rolled back meanwhile: for
# so long, the files are not made shorter.
_READERS_LOOK = 0.2  # seconds
_GROWTH = 1024  # steps by which a growing domain gets longer: 22 MB of 84x84 frames


class Writer:
    """begin(frame, state), append(frame, action, reward, discount, state, last), ..., begin(...)

    An exclusive writer is the only one of its domain while it is open. It starts at the end of the
    last whole episode: what a killed writer left of a cut one is dropped. Shared writers are any
    number, in any processes, each with an episode of its own; a cut episode's transitions stay.

    Every step is whole, and readable, when its call returns. A writer is used by one thread at a
    time, and only by the process that opened it: in a child of fork it is closed.
    """

    def __init__(self, store: Store, when_full: WhenFull, shared: bool) -> None:
        if when_full not in ("overwrite", "grow"):
            raise ValueError(f"when_full should be overwrite or grow, got {when_full!r}")
        if shared and when_full == "grow":
            raise ValueError("when_full should be overwrite for a shared writer, got grow")
        self._store = store.writable(shared=shared)
        self._when_full = when_full
        self._shared = shared
        self._rolled_back = -_READERS_LOOK
        try:
            self._core: Any = self._begin_where_it_ended()
        except BaseException:
            self._store.release()
            raise
        _open_writers.add(self)

    def begin(self, frame: NDArray[np.uint8], state: ArrayLike | None = None) -> None:
        """Commits the first step of an episode: its frame, zeros, discount 1.

        Args:
            frame: uint8 [C, H, W].
            state: numbers [*state_shape]; none: zeros.
        """
        if not self._core.begin(frame, state):
            self._grow(_GROWTH)
            self._core.begin(frame, state)

    def append(
        self,
        frame: NDArray[np.uint8],
        action: ArrayLike,
        reward: float,
        discount: float,
        state: ArrayLike | None = None,
        last: bool = False,
    ) -> None:
        """Commits the next step: the frame, and the action, reward and discount that led to it.

        A discount of 0 says that the episode terminated; `last` with another one, that it was cut.
        """
        if not self._core.append(frame, action, reward, discount, state, last):
            self._grow(_GROWTH)
            self._core.append(frame, action, reward, discount, state, last)

    def extend(
        self,
        frames: NDArray[np.uint8],
        actions: ArrayLike,
        rewards: ArrayLike,
        discounts: ArrayLike,
        states: ArrayLike | None = None,
        last: bool = False,
    ) -> None:
        """append() of n steps, one after the other, faster.

        An error says how many of them were committed, if any were.

        Args:
            frames: uint8 [n, C, H, W].
            actions: numbers [n, *action_shape].
            rewards, discounts: numbers [n].
            states: numbers [n, *state_shape]; none: zeros.
            last: whether the n-th step ends the episode.
        """
        steps = (frames, actions, rewards, discounts, states, last)
        done = self._core.extend(*steps, 0)
        while done < len(frames):
            try:
                self._grow(max(_GROWTH, len(frames) - done))
            except DatasetFullError as error:
                so_far = f"{done} of {len(frames)} steps were committed; {error}"
                raise DatasetFullError(so_far) from error
            done += self._core.extend(*steps, done)

    def discard_last_episode(self) -> None:
        """Takes the newest episode away again, ended or not."""
        if self._shared:
            raise RuntimeError("discard_last_episode() is for writers with shared=False")
        start = self._core.start_of_last_episode()
        if start is None:
            raise RuntimeError(
                "the newest episode cannot be discarded: steps of other writers lie among its own"
            )
        self._roll_back(self._core, start)

    def fit(self, more: int) -> None:
        """Makes a growing domain's arrays end `more` steps after the newest one."""
        if self._when_full != "grow":
            raise RuntimeError("fit() is for writers with when_full=grow")
        if more < 0:
            raise ValueError(f"more should be at least 0, got {more}")
        # Also where the capacity is right: a kill may have left some of the files longer.
        self._resize(max(1, self._store.ring().head() + more))

    def close(self) -> None:
        if not isinstance(self._core, _Unusable):
            try:
                self._core.close()
            finally:
                self._core = _Unusable("the writer is closed")
                self._store.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin_where_it_ended(self) -> RingWriter:
        ring = self._store.ring()
        if self._when_full == "grow" and ring.head() > self._store.capacity:
            raise ValueError(
                "when_full should be overwrite for a domain that has overwritten steps, got grow"
            )
        if self._when_full == "overwrite" and self._store.place.in_memory:
            self._store.populate()
        core = RingWriter(ring, shared=self._shared, overwrites=self._when_full == "overwrite")
        if not self._shared:
            self._roll_back(core, core.end_of_whole_episodes())
        return core

    def _roll_back(self, core: RingWriter, step: int) -> None:
        head = self._store.ring().head()
        core.roll_back(step)
        if step < head:
            self._rolled_back = time.monotonic()

    def _grow(self, steps: int) -> None:
        self._resize(self._store.capacity + steps)

    def _resize(self, capacity: int) -> None:
        if capacity < self._store.capacity:
            time.sleep(max(0.0, self._rolled_back + _READERS_LOOK - time.monotonic()))
        self._store.resize(capacity)
        self._core.move(self._store.ring())

    def _leave_to_parent(self) -> None:
        self._core = _Unusable(
            "the writer belongs to the process that opened it, and this is a child of that: open "
            "another one here"
        )
        self._store.leave_to_parent()


class _Unusable:
    """What a writer has instead of its core; every use is an error."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(self._why)


_open_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for writer in _open_writers:
        writer._leave_to_parent()


os.register_at_fork(after_in_child=_leave_to_parent)
