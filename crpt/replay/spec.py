"""What a step of a domain looks like. The arrays of a domain have one slot a step."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np


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
        """Data type and shape of one slot of every array.

        A slot holds a frame and the action, reward and discount that led to it; in the first step
        of an episode, zeros and a discount of 1. `previous` is the ticket of the step before in the
        same episode, `stamps` says which step lies whole in the slot (csrc/replay/ring.h).
        """
        return {
            "frames": (np.dtype(np.uint8), self.frame_shape),
            "actions": (np.dtype(np.float32), self.action_shape),
            "rewards": (np.dtype(np.float32), ()),
            "discounts": (np.dtype(np.float32), ()),
            "is_first": (np.dtype(np.bool_), ()),
            "is_last": (np.dtype(np.bool_), ()),
            "states": (np.dtype(np.float64), self.state_shape),
            "previous": (np.dtype("<u8"), ()),
            "stamps": (np.dtype("<u8"), ()),
        }

    def bytes_per_step(self) -> int:
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.fields().values())


def _require_dimension(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} should be made of ints, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} should be at least {least}, got {value}")
