"""Replay buffers whose frames, rewards and actions all say which step they are of, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from crpt import replay
from crpt.replay import DomainSpec, ReplayBuffer

SPEC = DomainSpec(capacity=9, action_shape=(2,), state_shape=(1,), frame_shape=(1, 4, 4))


def frame(identity: int) -> np.ndarray:
    return np.full(SPEC.frame_shape, identity, np.uint8)


def write_episode(writer: replay.Writer, first: int, length: int, discount: float = 1.0) -> None:
    """`length` transitions whose frames, rewards and actions count up from `first`."""
    writer.begin(frame(first), np.array([first]))
    for n in range(first + 1, first + length + 1):
        last = n == first + length
        action = np.array([n, -n])
        writer.append(frame(n), action, n, discount if last else 1.0, np.array([n]), last)


def filled(place: Path | None, episodes: int = 4, length: int = 6, **spec) -> ReplayBuffer:
    spec = {"capacity": 100, "action_shape": (2,), "state_shape": (1,), **spec}
    buffer = ReplayBuffer.create(place, {"toy": DomainSpec(**{"frame_shape": (1, 4, 4), **spec})})
    with buffer.writer("toy") as writer:
        for e in range(episodes):
            write_episode(writer, 10 * e, length, discount=0.0 if e % 2 else 1.0)
    return buffer


def ids(images: torch.Tensor) -> list[tuple[int, ...]]:
    """[N, K, 4, 4] of constant frames -> their values."""
    return [tuple(row) for row in images[:, :, 0, 0].tolist()]
