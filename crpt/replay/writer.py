"""Appends episodes to one domain."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crpt.replay.core import RingWriter
from crpt.replay.store import Store

WhenFull = Literal["overwrite", "grow"]
_GROWTH = 1024  # steps by which a growing domain gets longer: 22 MB of 84x84 frames


class Writer:
    """begin(frame, state), append(frame, action, reward, discount, state, last), ..., begin(...)

    An exclusive writer is the only one of its domain while it is open. It starts at the end of the
    last whole episode: what a killed writer left of a cut one is dropped. Shared writers are any
    number, in any processes, each with an episode of its own; a cut episode's transitions stay.

    Every step is whole, and readable, when its call returns. A writer is used by one thread at a
    time.
    """

    def __init__(self, store: Store, when_full: WhenFull, shared: bool) -> None:
        if when_full not in ("overwrite", "grow"):
            raise ValueError(f"when_full should be overwrite or grow, got {when_full!r}")
        if shared and when_full == "grow":
            raise ValueError("when_full should be overwrite for a shared writer, got grow")
        self._store = store.writable(shared=shared)
        self._when_full = when_full
        self._shared = shared
        try:
            self._core: Any = self._begin_where_it_ended()
        except BaseException:
            self._store.release()
            raise

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
            self._grow(max(_GROWTH, len(frames) - done))
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
        self._core.roll_back(start)

    def fit(self, more: int) -> None:
        """Makes a growing domain's arrays end `more` steps after the newest one."""
        if self._when_full != "grow":
            raise RuntimeError("fit() is for writers with when_full=grow")
        if more < 0:
            raise ValueError(f"more should be at least 0, got {more}")
        # Also where the capacity is right: a kill may have left some of the files longer.
        self._resize(max(1, self._store.ring().head() + more))

    def close(self) -> None:
        if not isinstance(self._core, _Closed):
            try:
                self._core.close()
            finally:
                self._core = _Closed()
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
            core.roll_back(core.end_of_whole_episodes())
        return core

    def _grow(self, steps: int) -> None:
        self._resize(self._store.capacity + steps)

    def _resize(self, capacity: int) -> None:
        self._store.resize(capacity)
        self._core.move(self._store.ring())


class _Closed:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("the writer is closed")
