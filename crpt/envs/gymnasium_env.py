"""Any Gymnasium environment that renders, by its id, with frames and actions as crpt has them."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete

from crpt.envs.actions import checked_action
from crpt.envs.rendering import (
    IncompatibleVersionsError,
    RenderingUnavailableError,
    select_backend,
)

_log = logging.getLogger(__name__)
_EXTRA = "pip install 'crpt[gymnasium]'"
_WITHOUT_OPENGL = ("classic_control", "toy_text", "box2d", "phys2d", "tabular")


class GymnasiumEnv(gymnasium.Env):
    """frame_t, r_t = render() after `action_repeat` steps, sum of their rewards.

    Observations are what the environment renders, averaged down to uint8 [3, H, W]; actions are
    float32 in [-1, 1]. Those of a Box are mapped linearly onto its range (one without limits gets
    them as they are); of a Discrete(n) there are n, and the largest is what is done. `terminated`
    and `truncated` are the environment's own. `info` has `discount`, 0 at a termination, and
    `state`: the environment's own observation, where that is a vector, else empty.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012, gymnasium's own convention
    render_mode = "rgb_array"
    action_space: Box

    def __init__(self, domain: str, *, action_repeat: int = 2, image_size: int = 84) -> None:
        spec = find_spec(domain)
        _prepare_renderer(spec)
        with _missing_packages_explained(domain):
            self._env = gymnasium.make(spec, render_mode="rgb_array", disable_env_checker=True)
        modes = self._env.metadata.get("render_modes", [])
        if "rgb_array" not in modes:
            raise ValueError(
                f"domain should be an environment that renders with render_mode rgb_array, got "
                f"{domain} with {list(modes)}"
            )
        self._domain = domain
        self._action_repeat = action_repeat
        self._image_size = image_size
        self._frame: np.ndarray | None = None
        self._running = False
        self._actions = self._env.action_space
        self.action_space = Box(-1.0, 1.0, _action_shape(domain, self._actions), np.float32)
        self.observation_space = Box(0, 255, (3, image_size, image_size), np.uint8)
        fps = self._env.metadata.get("render_fps")
        if fps is not None:
            self.metadata = {**self.metadata, "render_fps": fps / action_repeat}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        observation, _ = self._env.reset(seed=seed, options=options)
        self._running = True
        return self._observe(), {"discount": 1.0, "state": self._state(observation)}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if not self._running:
            raise RuntimeError("the episode has ended or not begun; call reset() before step()")
        theirs = self._their_action(checked_action(action, self.action_space.shape))
        total, terminated, truncated = 0.0, False, False
        for _ in range(self._action_repeat):
            observation, reward, terminated, truncated, _ = self._env.step(theirs)
            total += float(reward)
            if terminated or truncated:
                break
        self._running = not (terminated or truncated)
        info = {"discount": 0.0 if terminated else 1.0, "state": self._state(observation)}
        return self._observe(), total, bool(terminated), bool(truncated and not terminated), info

    def render(self) -> np.ndarray:
        """The last frame as uint8 [H, W, 3]."""
        if self._frame is None:
            raise RuntimeError("there is no frame yet; call reset() before render()")
        return self._frame.transpose(1, 2, 0)

    def close(self) -> None:
        self._env.close()

    def _their_action(self, action: np.ndarray) -> Any:
        space = self._actions
        if isinstance(space, Discrete):
            return space.start + int(np.argmax(action))
        assert isinstance(space, Box)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        bounded = np.isfinite(low) & np.isfinite(high)
        with np.errstate(invalid="ignore"):  # of the dimensions without limits
            mapped = (high + low) / 2 + (high - low) / 2 * action
        # Clipped, because of rounding.
        return np.clip(np.where(bounded, mapped, action).astype(space.dtype), space.low, space.high)

    def _observe(self) -> np.ndarray:
        with _missing_packages_explained(self._domain):
            picture = np.asarray(self._env.render())
        if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            raise TypeError(
                f"{self._domain} should render uint8 [H, W, 3], got {picture.dtype} of shape "
                f"{list(picture.shape)}"
            )
        self._frame = np.array(_resized(picture, self._image_size).transpose(2, 0, 1), order="C")
        return self._frame

    def _state(self, observation: Any) -> np.ndarray:
        space = self._env.observation_space
        if isinstance(space, Box) and len(space.shape) <= 1:
            return np.array(observation, np.float64).ravel()
        return np.zeros(0)


def is_gymnasium_id(domain: str) -> bool:
    """Whether a name can only be Gymnasium's: registered, versioned, or of a module or package."""
    return domain in gymnasium.registry or bool(re.search(r"[:/]|-v\d+$", domain))


def find_spec(domain: str) -> EnvSpec:
    """What Gymnasium knows of the id, without making the environment; ValueError if nothing."""
    try:
        return gymnasium.spec(_imported(domain))
    except (gymnasium.error.Error, ImportError) as error:
        known = list(gymnasium.registry)
        close = difflib.get_close_matches(domain.split(":")[-1], known, n=5, cutoff=0.6)
        remedy = (
            f"close to it: {', '.join(close)}"
            if close
            else "install the package that has it, and name the module that registers it where it "
            "is not found by itself: MODULE:ID, as in ale_py:ALE/Pong-v5"
        )
        raise ValueError(
            "domain should be the id of a Gymnasium environment that is installed, got "
            f"{domain!r} ({str(error).rstrip('.')}); {remedy}"
        ) from None


def warn_unless_repeatable(env: gymnasium.Env[Any, Any], domain: str) -> None:
    """Warns of a Gymnasium environment whose episodes depend on more than their seed and actions.

    dm_control's are known not to.
    """
    if not isinstance(env.unwrapped, GymnasiumEnv):
        return
    played = [_first_steps(env, seed) for seed in (1, 2, 1)]
    if played[0] != played[2]:
        _log.warning(
            "%s plays differently from the same seed: what is recorded are true episodes, but "
            "collecting again, or going on after an interruption, gives others",
            domain,
        )


def _first_steps(env: gymnasium.Env[Any, Any], seed: int) -> list[bytes]:
    actions = np.random.default_rng(seed)
    frame, info = env.reset(seed=seed)
    seen = [frame.tobytes() + info["state"].tobytes()]
    space = env.action_space
    assert isinstance(space, Box)
    for _ in range(3):
        action = actions.uniform(space.low, space.high).astype(np.float32)
        frame, *outcome, info = env.step(action)
        seen.append(frame.tobytes() + info["state"].tobytes() + repr(outcome).encode())
        if outcome[1] or outcome[2]:
            break
    return seen


def _imported(domain: str) -> str:
    """The id without its module, which is imported so that it registers what it has."""
    module, _, name = domain.rpartition(":")
    if module:
        __import__(module)
    return name


@contextlib.contextmanager
def _missing_packages_explained(domain: str) -> Iterator[None]:
    try:
        yield
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise RenderingUnavailableError(
            f"{domain} needs a package that is not installed: {error}; {_EXTRA} has those of "
            "Gymnasium's classic-control environments, the others have extras of their own"
        ) from error


def _prepare_renderer(spec: EnvSpec) -> None:
    # A frame needs neither a display nor a sound card.
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if not any(f".{part}" in str(spec.entry_point) for part in _WITHOUT_OPENGL):
        # Those on MuJoCo take their backend from where dm_control does; others may need none.
        with contextlib.suppress(RenderingUnavailableError, IncompatibleVersionsError):
            select_backend()


def _action_shape(domain: str, space: gymnasium.Space[Any]) -> tuple[int, ...]:
    if isinstance(space, Discrete):
        return (int(space.n),)
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        return space.shape
    raise ValueError(f"{domain} should have actions of a float Box or Discrete, got {space}")


def _resized(picture: np.ndarray, size: int) -> np.ndarray:
    """Each pixel the mean of those it covers, in whole numbers: the same on every machine."""
    if picture.shape[:2] == (size, size):
        return picture
    try:
        from PIL import Image
    except ImportError as error:
        raise RenderingUnavailableError(
            f"frames of {picture.shape[1]}x{picture.shape[0]} pixels are resized with Pillow, "
            f"which is not installed: {_EXTRA}"
        ) from error
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))
