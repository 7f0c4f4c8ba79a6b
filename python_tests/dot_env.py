"""A world small enough to learn in seconds: a dot that actions push, drawn on a dim background."""

from __future__ import annotations

import zlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

SIZE = 20
EPISODE = 12


class DotEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """state = (x, y) in [-1, 1]; action moves it; reward 1 - |state|; its name tints it."""

    def __init__(self, domain: str, image_size: int = SIZE) -> None:
        self.tint = np.random.default_rng(zlib.crc32(domain.encode())).uniform(0.3, 1.0, 3)
        self.image_size = image_size
        self.observation_space = Box(0, 255, (3, image_size, image_size), np.uint8)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.state = np.zeros(2)
        self.steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        self.steps = 0
        return self._frame(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.state = np.clip(self.state + 0.3 * np.asarray(action, np.float64), -1, 1)
        self.steps += 1
        reward = 1.0 - float(np.abs(self.state).max())
        return self._frame(), reward, False, self.steps == EPISODE, self._info()

    def _info(self) -> dict[str, Any]:
        return {"discount": 1.0, "state": self.state.copy()}

    def _frame(self) -> np.ndarray:
        grid = np.linspace(-1.2, 1.2, self.image_size)
        blob = np.exp(
            -((grid[:, None] - self.state[1]) ** 2 + (grid[None, :] - self.state[0]) ** 2) / 0.05
        )
        pixels = 20 + 200 * self.tint[:, None, None] * blob
        return pixels.astype(np.uint8)


def make(
    domain: str, *, render: str = "exact", action_repeat: int = 1, image_size: int = SIZE
) -> gymnasium.Env[Any, Any]:
    return DotEnv(domain, image_size)
