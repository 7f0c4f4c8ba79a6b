"""Appends episodes to one domain."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from crpt.replay.store import COMMITTED, FLOOR, SEALED, Store

WhenFull = Literal["overwrite", "grow"]
_GROWTH = 1024  # steps by which a growing domain gets longer: 22 MB of 84x84 frames


class Writer:
    """begin(frame, state), append(frame, action, reward, discount, state, last), ..., begin(...)

    The only writer of its domain while it is open. It starts at the end of the last whole episode:
    what a killed writer left of a cut one is dropped. Every step is committed, and readable, when
    its call returns.
    """

    def __init__(self, store: Store, when_full: WhenFull = "overwrite") -> None:
        if when_full not in ("overwrite", "grow"):
            raise ValueError(f"when_full should be overwrite or grow, got {when_full!r}")
        self._store = store.writable()
        self._when_full = when_full
        self._open = False  # an episode has begun and not ended
        self._closed = False
        self._roll_back(int(self._store.cursor[SEALED]))
        if when_full == "grow" and int(self._store.cursor[FLOOR]) > 0:
            self.close()
            raise ValueError(
                "when_full should be overwrite for a domain that has overwritten steps, got grow"
            )

    def begin(self, frame: np.ndarray[Any, Any], state: np.ndarray[Any, Any] | None = None) -> None:
        """Commits the first step of an episode: its frame, zeros, discount 1."""
        if self._open:
            raise RuntimeError("the episode has not ended; append its last step before begin()")
        self._commit(frame, 0.0, 0.0, 1.0, state, first=True, last=False)

    def append(
        self,
        frame: np.ndarray[Any, Any],
        action: np.ndarray[Any, Any],
        reward: float,
        discount: float,
        state: np.ndarray[Any, Any] | None = None,
        last: bool = False,
    ) -> None:
        """Commits the next step: the frame, and the action, reward and discount that led to it.

        A discount of 0 says that the episode terminated; `last` with another one, that it was cut.
        """
        if not self._open:
            raise RuntimeError("no episode has begun; call begin() before append()")
        self._require("action", action, self._store.spec.action_shape)
        self._commit(frame, action, reward, discount, state, first=False, last=last)

    def discard_last_episode(self) -> None:
        """Takes the newest episode away again, ended or not."""
        floor, committed = self._store.window()
        is_first = self._store.arrays["is_first"]
        for step in range(committed - 1, floor - 1, -1):
            if is_first[step % len(is_first)]:
                self._roll_back(step)
                return
        self._roll_back(floor)

    def fit(self, more: int) -> None:
        """Makes a growing domain's arrays end `more` steps after the newest one."""
        if self._when_full != "grow":
            raise RuntimeError("fit() is for writers with when_full=grow")
        # Also where the capacity is right: a kill may have left some of the files longer.
        self._store.resize(int(self._store.cursor[COMMITTED]) + more)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._open = False
            self._store.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _roll_back(self, step: int) -> None:
        # Shrinking order: a reader between two of these stores sees fewer steps, never wrong ones.
        cursor = self._store.cursor
        if int(cursor[SEALED]) > step:
            cursor[SEALED] = step
        cursor[COMMITTED] = step
        cursor[FLOOR] = min(int(cursor[FLOOR]), step)
        self._open = False

    def _require(self, name: str, value: Any, shape: tuple[int, ...]) -> None:
        got = np.shape(value)
        if got != shape:
            raise ValueError(f"{name} should be {list(shape)}, got {list(got)}")

    def _commit(
        self,
        frame: np.ndarray[Any, Any],
        action: np.ndarray[Any, Any] | float,
        reward: float,
        discount: float,
        state: np.ndarray[Any, Any] | None,
        *,
        first: bool,
        last: bool,
    ) -> None:
        if self._closed:
            raise RuntimeError("the writer is closed")
        spec, store = self._store.spec, self._store
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
            got = frame.dtype if isinstance(frame, np.ndarray) else type(frame).__name__
            raise TypeError(f"frame should be a uint8 array, got {got}")
        self._require("frame", frame, spec.frame_shape)
        state = np.zeros(spec.state_shape) if state is None else state
        self._require("state", state, spec.state_shape)
        if not math.isfinite(reward):
            raise ValueError(f"reward should be finite, got {reward}")
        if not 0.0 <= discount <= 1.0:
            raise ValueError(f"discount should be in [0, 1], got {discount}")
        step = int(store.cursor[COMMITTED])
        if step - int(store.cursor[FLOOR]) >= store.capacity:
            if self._when_full == "grow":
                store.resize(store.capacity + _GROWTH)
            else:
                store.cursor[FLOOR] = step - store.capacity + 1
        slot = step % store.capacity
        arrays = store.arrays
        arrays["frames"][slot] = frame
        arrays["actions"][slot] = action
        arrays["rewards"][slot] = reward
        arrays["discounts"][slot] = discount
        arrays["is_first"][slot] = first
        arrays["is_last"][slot] = last
        arrays["states"][slot] = state
        if last:
            store.cursor[SEALED] = step + 1
        store.cursor[COMMITTED] = step + 1
        self._open = not last
