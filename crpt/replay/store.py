"""The storage of one domain: an array per field, a slot per step, and the cursor that commits them.

The step numbered n lives in slot n % capacity. It holds frame_n and the action, reward and discount
that led to it; the first step of an episode holds zeros and a discount of 1.

The cursor is three words. One writer stores to them, each with one aligned 8-byte store; any number
of readers, in any process, load them:

    committed   steps before it are whole: stored after the step's data
    sealed      end of the last whole episode: stored after its data, before `committed`
    floor       oldest step not yet overwritten: stored before the overwriting

So a writer killed at any moment leaves [floor, committed) whole, and its successor goes on from
`sealed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crpt.replay.errors import DatasetLockedError

Array = NDArray[Any]
COMMITTED, SEALED, FLOOR = range(3)
CURSOR_WORDS = 3


@dataclass(frozen=True, kw_only=True)
class DomainSpec:
    """What a step of a domain looks like, and how many of them are kept."""

    capacity: int
    """Slots: steps kept, the first frame of every episode included."""
    action_shape: tuple[int, ...]
    state_shape: tuple[int, ...] = (0,)
    """Shape of the simulator state stored beside each frame."""
    frame_shape: tuple[int, int, int] = (3, 84, 84)
    """[C, H, W] of one frame."""
    camera: int | str | None = None
    """The simulator's camera that drew the frames, where that is known."""

    def __post_init__(self) -> None:
        _require_dimension("capacity", self.capacity, 1)
        for name in ("action_shape", "state_shape", "frame_shape"):
            shape = tuple(getattr(self, name))
            object.__setattr__(self, name, shape)  # a list, as JSON has it, becomes a tuple
            for size in shape:
                _require_dimension(name, size, 1 if name == "frame_shape" else 0)
        if len(self.frame_shape) != 3:
            raise ValueError(f"frame_shape should be [C, H, W], got {list(self.frame_shape)}")

    def fields(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Data type and shape of one slot of every array."""
        return {
            "frames": (np.dtype(np.uint8), self.frame_shape),
            "actions": (np.dtype(np.float32), self.action_shape),
            "rewards": (np.dtype(np.float32), ()),
            "discounts": (np.dtype(np.float32), ()),
            "is_first": (np.dtype(np.bool_), ()),
            "is_last": (np.dtype(np.bool_), ()),
            "states": (np.dtype(np.float64), self.state_shape),
        }

    def bytes_per_step(self) -> int:
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.fields().values())


def _require_dimension(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} should be made of ints, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} should be at least {least}, got {value}")


class Store:
    """The arrays and the cursor of one domain; this one lives in memory and in one process."""

    def __init__(self, spec: DomainSpec) -> None:
        self.spec = spec
        self.arrays: dict[str, Array] = {
            name: np.zeros((spec.capacity, *shape), dtype)
            for name, (dtype, shape) in spec.fields().items()
        }
        self.cursor: NDArray[np.uint64] = np.zeros(CURSOR_WORDS, np.uint64)
        self._locked = False

    @property
    def capacity(self) -> int:
        return len(self.arrays["is_first"])

    def window(self) -> tuple[int, int]:
        """The steps [floor, committed) that can be read, oldest first."""
        committed = int(self.cursor[COMMITTED])
        return min(int(self.cursor[FLOOR]), committed), committed

    def resize(self, capacity: int) -> None:
        """Changes the number of slots. Only while no step was overwritten, or slots would move."""
        for name, array in self.arrays.items():
            resized = np.zeros((capacity, *array.shape[1:]), array.dtype)
            kept = min(capacity, len(array))
            resized[:kept] = array[:kept]
            self.arrays[name] = resized

    def writable(self) -> Store:
        """The store to write through, locked against other writers until `release`."""
        if self._locked:
            raise DatasetLockedError("the domain already has a writer; close it first")
        self._locked = True
        return self

    def release(self) -> None:
        self._locked = False

    def view(self) -> Mapping[str, Array]:
        """The arrays, read-only."""
        views = {name: array.view() for name, array in self.arrays.items()}
        for array in views.values():
            array.flags.writeable = False
        return views
