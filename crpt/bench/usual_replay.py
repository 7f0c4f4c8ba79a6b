"""The replay buffers that `bench replay` compares with: each stores both stacks of a transition."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crpt.bench.replay_writers import Steps


@dataclass(frozen=True)
class Transitions:
    """An episode as those buffers take it."""

    obs: NDArray[np.uint8]  # [T, K*C, H, W]
    next_obs: NDArray[np.uint8]  # [T, K*C, H, W]
    actions: NDArray[np.float32]  # [T, A]
    rewards: NDArray[np.float32]  # [T]
    dones: NDArray[np.float32]  # [T]

    def __len__(self) -> int:
        return len(self.obs)

    @staticmethod
    def of(steps: Steps, frame_stack: int) -> Transitions:
        rows = np.arange(len(steps) + 1)
        backs = reversed(range(frame_stack))
        stacks = np.concatenate([steps.frames[np.maximum(rows - b, 0)] for b in backs], axis=1)
        dones = np.zeros(len(steps), np.float32)
        dones[-1] = 1
        return Transitions(
            stacks[:-1].copy(), stacks[1:].copy(), steps.actions[1:], steps.rewards[1:], dones
        )


class Usual(ABC):
    """A buffer of `capacity` transitions; it is given those that it was made for."""

    name: str
    package: str

    @abstractmethod
    def __init__(self, capacity: int, like: Transitions) -> None: ...

    @abstractmethod
    def append(self, t: Transitions) -> None:
        """One after the other."""

    @abstractmethod
    def sample(self, batch_size: int) -> object: ...

    @abstractmethod
    def nbytes(self) -> int:
        """Of its arrays."""

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version(cls.package)


class UsualOfMany(Usual):
    """One that takes many transitions in one call."""

    @abstractmethod
    def extend(self, t: Transitions) -> None:
        """All at once."""


class Cpprb(UsualOfMany):
    name = package = "cpprb"

    def __init__(self, capacity: int, like: Transitions) -> None:
        pixels = {"shape": like.obs.shape[1:], "dtype": np.uint8}
        self._capacity = capacity
        self._buffer = importlib.import_module("cpprb").ReplayBuffer(
            capacity,
            {
                "obs": pixels, "act": {"shape": like.actions.shape[1:]}, "rew": {},
                "next_obs": pixels, "done": {},
            },
        )  # fmt: skip

    def append(self, t: Transitions) -> None:
        for i in range(len(t)):
            self._buffer.add(
                obs=t.obs[i], act=t.actions[i], rew=t.rewards[i], next_obs=t.next_obs[i],
                done=t.dones[i],
            )  # fmt: skip
        self._buffer.on_episode_end()

    def extend(self, t: Transitions) -> None:
        self._buffer.add(obs=t.obs, act=t.actions, rew=t.rewards, next_obs=t.next_obs, done=t.dones)
        self._buffer.on_episode_end()

    def sample(self, batch_size: int) -> object:
        return self._buffer.sample(batch_size)

    def nbytes(self) -> int:
        one = self._buffer.sample(1)
        return self._capacity * sum(
            one[k].nbytes for k in ("obs", "act", "rew", "next_obs", "done")
        )


class StableBaselines3(Usual):
    name, package = "Stable-Baselines3", "stable-baselines3"

    def __init__(self, capacity: int, like: Transitions) -> None:
        from gymnasium.spaces import Box

        buffers = importlib.import_module("stable_baselines3.common.buffers")
        self._buffer = buffers.ReplayBuffer(
            capacity,
            Box(0, 255, like.obs.shape[1:], np.uint8),
            Box(-1, 1, like.actions.shape[1:], np.float32),
            device="cpu",
        )

    def append(self, t: Transitions) -> None:
        for i in range(len(t)):
            self._buffer.add(
                t.obs[i : i + 1], t.next_obs[i : i + 1], t.actions[i : i + 1],
                t.rewards[i : i + 1], t.dones[i : i + 1], [{}],
            )  # fmt: skip

    def sample(self, batch_size: int) -> object:
        return self._buffer.sample(batch_size)

    def nbytes(self) -> int:
        b = self._buffer
        arrays = (b.observations, b.next_observations, b.actions, b.rewards, b.dones, b.timeouts)
        return sum(array.nbytes for array in arrays)


class TorchRL(UsualOfMany):
    name, package = "TorchRL", "torchrl"

    def __init__(self, capacity: int, like: Transitions) -> None:
        data = importlib.import_module("torchrl.data")
        logging.getLogger("torchrl").setLevel(logging.WARNING)
        self._dict = importlib.import_module("tensordict").TensorDict
        self._buffer = data.TensorDictReplayBuffer(storage=data.LazyTensorStorage(capacity))
        # What an environment of TorchRL hands over as it is; making them is not timed.
        self._steps, self._episode = list(self._tensors(like).unbind(0)), self._tensors(like)

    def append(self, t: Transitions) -> None:
        for step in self._steps:
            self._buffer.add(step)

    def extend(self, t: Transitions) -> None:
        self._buffer.extend(self._episode)

    def sample(self, batch_size: int) -> object:
        return self._buffer.sample(batch_size)

    def nbytes(self) -> int:
        storage = self._buffer.storage._storage
        return sum(v.nbytes for k, v in storage.items() if k != "index")

    def _tensors(self, t: Transitions) -> Any:
        return self._dict(
            {
                "obs": torch.from_numpy(t.obs),
                "action": torch.from_numpy(t.actions),
                "reward": torch.from_numpy(t.rewards),
                "next_obs": torch.from_numpy(t.next_obs),
                "done": torch.from_numpy(t.dones),
            },
            batch_size=[len(t)],
        )


EVERY: tuple[type[Usual], ...] = (Cpprb, StableBaselines3, TorchRL)


def installed() -> tuple[list[type[Usual]], list[str]]:
    """Those that can be imported, and a line for each of the others."""
    found, missing = [], []
    for usual in EVERY:
        try:
            usual.version()
            importlib.import_module(usual.package.replace("-", "_"))
            found.append(usual)
        except ImportError as error:  # PackageNotFoundError is one
            reason = (
                "" if isinstance(error, importlib.metadata.PackageNotFoundError) else f" ({error})"
            )
            missing.append(
                f"{usual.name} is not installed{reason}: its rows are left out; "
                f"pip install '.[bench]' brings it"
            )
    return found, missing
