"""Random play in one domain: episode e is a pure function of (seed, domain, e)."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gymnasium.spaces import Box

from crpt.envs import IncompatibleVersionsError, RenderingUnavailableError, warn_unless_repeatable
from crpt.replay import DatasetError, DatasetLockedError, DomainSpec, ReplayBuffer, Writer

if TYPE_CHECKING:
    import gymnasium

    from crpt.config import CollectConfig

MakeEnv = Callable[..., "gymnasium.Env[Any, Any]"]
_FIRST_CAPACITY = 1024
_SECONDS_TO_END = 5.0  # for processes that were killed just now


class CollectError(RuntimeError):
    """A domain cannot be collected; the message names it. What was committed is kept."""


class Step(NamedTuple):
    """A frame, and what led to it; the first of an episode has no action."""

    frame: np.ndarray[Any, Any]
    state: np.ndarray[Any, Any]
    action: np.ndarray[Any, Any] | None = None
    reward: float = 0.0
    discount: float = 1.0
    last: bool = False

    def kept(self) -> Step:
        """The same step, for keeping: environments may draw the next frame into the same array."""
        return self._replace(frame=np.array(self.frame), state=np.array(self.state))


class Player:
    """Plays the episodes of one domain, in any order."""

    def __init__(self, config: CollectConfig, domain: str, *, seed: int, make_env: MakeEnv) -> None:
        self._config = config
        self._domain = domain
        self._seed = seed
        self._env = make_env(
            domain,
            render=config.render,
            action_repeat=config.action_repeat,
            image_size=config.image_size,
        )
        space = self._env.action_space
        if not isinstance(space, Box) or not space.is_bounded():
            self._env.close()
            raise TypeError(f"env should have a bounded Box of actions, got {space}")
        self._space = space

    def play(self, episode: int) -> Iterator[Step]:
        """The steps of an episode; a request that ends within it takes the first ones."""
        if episode == 0:
            warn_unless_repeatable(self._env, self._domain)
        source = episode_seed(self._seed, self._domain, episode)
        env_source, action_source = source.spawn(2)
        actions = np.random.default_rng(action_source)
        frame, info = self._env.reset(seed=int(env_source.generate_state(1)[0]))
        yield Step(frame, state_of(info))
        length, last = 0, False
        while not last:
            action = actions.uniform(self._space.low, self._space.high).astype(np.float32)
            frame, reward, terminated, truncated, info = self._env.step(action)
            length += 1
            last = terminated or truncated or length == self._config.episode_length
            discount = discount_of(info, terminated)
            yield Step(frame, state_of(info), action, float(reward), discount, last)

    def spec(self, step: Step) -> DomainSpec:
        """What a domain of such steps looks like."""
        return DomainSpec(
            capacity=_FIRST_CAPACITY,
            action_shape=self._space.shape,
            state_shape=step.state.shape,
            frame_shape=step.frame.shape,
            camera=getattr(self._env.unwrapped, "camera", None),
        )

    def close(self) -> None:
        self._env.close()


class EpisodeWriter:
    """Writes one episode to the end of its domain, where `room` transitions are missing.

    The domain is locked against other writers while this is open.
    """

    def __init__(self, buffer: ReplayBuffer, domain: str, spec: DomainSpec, room: int) -> None:
        if domain not in buffer.domains:
            buffer.add_domain(domain, spec)
        self._writer = buffer.writer(domain, when_full="grow")
        self._room = room

    def write(self, step: Step) -> bool:
        """Whether that was the last step: of the episode, or of all that was asked for."""
        if step.action is None:
            self._writer.begin(step.frame, step.state)
            return False
        self._room -= 1
        last = step.last or self._room == 0
        if self._room == 0:
            # Before the last commit, so that arrays without a free slot mean a finished request.
            self._writer.fit(1)
        self._writer.append(step.frame, step.action, step.reward, step.discount, step.state, last)
        return last

    def close(self) -> None:
        self._writer.close()


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
    if is_complete(config, buffer, domain):
        return
    with errors_named(domain):
        episode, transitions = resume(buffer, domain)
        player = Player(config, domain, seed=seed, make_env=make_env)
        try:
            while transitions < config.transitions:
                room = config.transitions - transitions
                for length in _record_episode(player, buffer, domain, episode, room):
                    on_progress(transitions + length)
                transitions += length
                episode += 1
        finally:
            player.close()


def _record_episode(
    player: Player, buffer: ReplayBuffer, domain: str, episode: int, room: int
) -> Iterator[int]:
    """Its length so far, after each transition."""
    steps = player.play(episode)
    first = next(steps)
    writer = EpisodeWriter(buffer, domain, player.spec(first), room)
    try:
        writer.write(first)
        for length, step in enumerate(steps, start=1):
            last = writer.write(step)
            yield length
            if last:
                return
    finally:
        writer.close()


def resume(buffer: ReplayBuffer, domain: str) -> tuple[int, int]:
    """Where to go on: `find_end`, but before an episode that a smaller request cut short."""
    if domain in buffer.domains:
        with _writer(buffer, domain) as writer:
            if buffer.cursor(domain) == buffer.capacity(domain):
                writer.discard_last_episode()
    return find_end(buffer, domain)


def find_end(buffer: ReplayBuffer, domain: str) -> tuple[int, int]:
    """How many episodes and transitions a domain has; drops an episode left by a killed process."""
    if domain not in buffer.domains:
        return 0, 0
    _writer(buffer, domain).close()  # opening it drops what is not whole
    return len(buffer.episodes(domain)), buffer.num_transitions(domain)


def _writer(buffer: ReplayBuffer, domain: str) -> Writer:
    deadline = time.monotonic() + _SECONDS_TO_END
    while True:
        try:
            return buffer.writer(domain, when_full="grow")
        except DatasetLockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


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


@contextlib.contextmanager
def errors_named(domain: str) -> Iterator[None]:
    """Puts the domain's name into errors that do not say enough as they are."""
    try:
        yield
    except (CollectError, DatasetError, RenderingUnavailableError, IncompatibleVersionsError):
        raise
    except Exception as error:
        raise CollectError(
            f"collecting {domain} failed: {type(error).__name__}: {error}"
        ) from error


def episode_seed(seed: int, domain: str, episode: int) -> np.random.SeedSequence:
    """The source of all randomness of one episode."""
    return np.random.SeedSequence([seed, zlib.crc32(domain.encode()), episode])


def state_of(info: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The simulator's state, a vector; empty where the environment tells none."""
    return np.asarray(info.get("state", ()), dtype=np.float64).ravel()


def discount_of(info: dict[str, Any], terminated: bool) -> float:
    """The environment's own discount; where it tells none, 0 for a true termination, else 1."""
    discount: float = info.get("discount", 0.0 if terminated else 1.0)
    return discount
