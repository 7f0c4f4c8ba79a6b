"""Evaluation: the return of a policy over whole episodes (`python -m crpt.evaluate`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from crpt.seeds import stream_seed

Policy = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""observation uint8 [C, H, W] -> action [A] in [-1, 1]."""


def evaluate_policy(
    policy: Policy,
    env: gymnasium.Env[Any, Any],
    episodes: int,
    *,
    seed: int,
    name: str = "",
    progress: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """return_e = sum of rewards of episode e, [episodes]; episode e begins from its own seed (seed,
    e).

    `on_step` is called after every step; what it raises ends the evaluation.
    """
    if episodes < 1:
        raise ValueError(f"episodes should be at least 1, got {episodes}")
    returns = np.zeros(episodes)
    for episode in tqdm(
        range(episodes), desc=name, unit="episode", disable=not progress, leave=False
    ):
        obs, _ = env.reset(seed=episode_seed(seed, episode))
        done = False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            returns[episode] += float(reward)
            done = terminated or truncated
            on_step()
    return returns


def episode_seed(seed: int, episode: int) -> int:
    """What an episode's environment is reset with: one 32-bit seed per (seed, episode)."""
    return stream_seed(seed, episode)


def random_policy(env: gymnasium.Env[Any, Any], *, seed: int) -> Policy:
    """Uniform actions in [-1, 1]."""
    rng = np.random.default_rng(seed)
    space = env.action_space
    assert isinstance(space, gymnasium.spaces.Box)

    def act(obs: NDArray[np.uint8]) -> NDArray[np.float32]:
        return rng.uniform(space.low, space.high).astype(np.float32)

    return act


def summary(returns: NDArray[np.float64]) -> dict[str, float | int]:
    """Mean, standard deviation (of the episodes) and number."""
    return {
        "return_mean": round(float(returns.mean()), 2),
        "return_std": round(float(returns.std()), 2),
        "episodes": len(returns),
    }
