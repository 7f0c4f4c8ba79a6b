"""Wrappers for acting: what a consumer of single frames puts around an environment."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box


class FrameStack(gymnasium.ObservationWrapper):
    """obs_t = concatenate(frame_{t-n+1}, ..., frame_t), the first frame repeated at reset.

    uint8 [C, H, W] -> uint8 [n*C, H, W], oldest frame first, as `ReplayBuffer.sample` stacks them.
    """

    def __init__(self, env: gymnasium.Env, n: int = 3) -> None:
        super().__init__(env)
        if n < 1:
            raise ValueError(f"n should be at least 1, got {n}")
        space = env.observation_space
        if not isinstance(space, Box) or len(space.shape) != 3 or space.dtype != np.uint8:
            raise ValueError(f"env should have uint8 [C, H, W] observations, got {space}")
        channels, height, width = space.shape
        self.observation_space = Box(0, 255, (n * channels, height, width), np.uint8)
        self._n = n
        self._frames: deque[np.ndarray] = deque(maxlen=n)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self._frames.clear()
        return super().reset(**kwargs)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        missing = self._n - len(self._frames)
        # A copy: an environment may draw its next frame into the same array.
        self._frames.extend([observation.copy()] * max(missing, 1))
        return np.concatenate(self._frames)
