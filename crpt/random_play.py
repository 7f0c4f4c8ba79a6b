"""Random play in one domain, recorded: episode e is a pure function of (seed, domain, e)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.spaces import Box

from crpt.envs import IncompatibleVersionsError, RenderingUnavailableError
from crpt.replay import DatasetError, DomainSpec, ReplayBuffer, Writer

if TYPE_CHECKING:
    import gymnasium

    from crpt.config import CollectConfig

MakeEnv = Callable[..., "gymnasium.Env[Any, Any]"]
_FIRST_CAPACITY = 1024


class CollectError(RuntimeError):
    """A domain cannot be collected; the message names it. What was committed is kept."""


def record(
    config: CollectConfig,
    buffer: ReplayBuffer,
    domain: str,
    *,
    seed: int,
    make_env: MakeEnv,
    on_progress: Callable[[int], None] = lambda transitions: None,
) -> None:
    """Records uniform random play until the domain has exactly `config.transitions` transitions.

    Goes on after the last whole episode that is there. The bytes depend on the config, the seed and
    the domain's name alone: not on when it was interrupted, nor on how many transitions were asked
    for before.

    Raises:
        CollectError: the environment failed.
    """
    try:
        _record(config, buffer, domain, seed, make_env, on_progress)
    except (CollectError, DatasetError, RenderingUnavailableError, IncompatibleVersionsError):
        raise
    except Exception as error:
        raise CollectError(
            f"collecting {domain} failed: {type(error).__name__}: {error}"
        ) from error


def _record(
    config: CollectConfig,
    buffer: ReplayBuffer,
    domain: str,
    seed: int,
    make_env: MakeEnv,
    on_progress: Callable[[int], None],
) -> None:
    if is_complete(config, buffer, domain):
        return
    env = make_env(
        domain,
        render=config.render,
        action_repeat=config.action_repeat,
        image_size=config.image_size,
    )
    try:
        actions = env.action_space
        if not isinstance(actions, Box) or not actions.is_bounded():
            raise TypeError(f"env should have a bounded Box of actions, got {actions}")
        if domain not in buffer.domains:
            buffer.add_domain(domain, _spec(env, actions, seed))
        with buffer.writer(domain, when_full="grow") as writer:
            if buffer.cursor(domain) == buffer.capacity(domain):
                # A finished, smaller request: it cut its last episode short.
                writer.discard_last_episode()
            episode = len(buffer.episodes(domain))
            while (missing := config.transitions - buffer.num_transitions(domain)) > 0:
                source = episode_seed(seed, domain, episode)
                _record_episode(config, writer, env, actions, source, missing, on_progress)
                episode += 1
    finally:
        env.close()


def is_complete(config: CollectConfig, buffer: ReplayBuffer, domain: str) -> bool:
    """Whether nothing is left to record; more transitions than asked for are an error."""
    if domain not in buffer.domains:
        return False
    have = buffer.num_transitions(domain)
    if have > config.transitions:
        raise ValueError(
            f"transitions should be at least the {have} that {buffer.path} has of {domain}, "
            f"got {config.transitions}; ask for more, or collect into another directory"
        )
    return have == config.transitions and buffer.capacity(domain) == buffer.cursor(domain)


def episode_seed(seed: int, domain: str, episode: int) -> np.random.SeedSequence:
    """The source of all randomness of one episode."""
    return np.random.SeedSequence([seed, zlib.crc32(domain.encode()), episode])


def _record_episode(
    config: CollectConfig,
    writer: Writer,
    env: gymnasium.Env[Any, Any],
    space: Box,
    source: np.random.SeedSequence,
    missing: int,
    on_progress: Callable[[int], None],
) -> None:
    limit = min(missing, config.episode_length or missing)
    env_source, action_source = source.spawn(2)
    actions = np.random.default_rng(action_source)
    frame, info = env.reset(seed=int(env_source.generate_state(1)[0]))
    writer.begin(frame, state_of(info))
    for step in range(1, limit + 1):
        action = actions.uniform(space.low, space.high).astype(np.float32)
        frame, reward, terminated, truncated, info = env.step(action)
        last = terminated or truncated or step == limit
        discount = discount_of(info, terminated)
        if step == missing:
            # Before the last commit, so that arrays without a free slot mean a finished request.
            writer.fit(1)
        writer.append(frame, action, float(reward), discount, state_of(info), last)
        on_progress(config.transitions - missing + step)
        if last:
            return


def _spec(env: gymnasium.Env[Any, Any], actions: Box, seed: int) -> DomainSpec:
    frame, info = env.reset(seed=seed % 2**32)
    return DomainSpec(
        capacity=_FIRST_CAPACITY,
        action_shape=actions.shape,
        state_shape=state_of(info).shape,
        frame_shape=frame.shape,
        camera=getattr(env.unwrapped, "camera", None),
    )


def state_of(info: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The simulator's state, a vector; empty where the environment tells none."""
    return np.asarray(info.get("state", ()), dtype=np.float64).ravel()


def discount_of(info: dict[str, Any], terminated: bool) -> float:
    """The environment's own discount; where it tells none, 0 for a true termination, else 1."""
    discount: float = info.get("discount", 0.0 if terminated else 1.0)
    return discount
