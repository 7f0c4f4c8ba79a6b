"""A dm_control environment as a gymnasium.Env whose observations are single frames."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from crpt.envs.actions import checked_action

if TYPE_CHECKING:
    from dm_control.rl.control import Environment

_log = logging.getLogger(__name__)
_UNBOUNDED = 1e9  # dm_control writes an actuator without limits as +-1e10


class DMControlEnv(gymnasium.Env):
    """frame_t, r_t = render(physics after `action_repeat` steps), sum of their rewards.

    Observations are uint8 [3, H, W]; actions float32 in [-1, 1], mapped linearly onto the task's
    range (an actuator without limits gets them as they are). `terminated` means that the discount
    fell to 0, `truncated` that the time limit was reached. `info` has `discount`, the product over
    the repeat, and `state`, float64, the simulator's position, velocity and activation. A
    simulation that diverges ends truncated at its last sound frame, with `physics_error` in `info`.
    An episode is a pure function of reset's seed and the actions.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012, gymnasium's own convention
    render_mode = "rgb_array"
    action_space: Box

    def __init__(
        self,
        env: Environment,
        seed: Callable[[int], None],
        *,
        camera: int | str,
        action_repeat: int = 2,
        image_size: int = 84,
        prepare_model: Callable[[Any], None] = lambda model: None,
    ) -> None:
        """`seed` seeds the next episode; `prepare_model` edits a model before it is first drawn."""
        self._env = env
        self._seed = seed
        self.camera = camera
        self._action_repeat = action_repeat
        self._image_size = image_size
        self._prepare_model = prepare_model
        self._model: Any = None
        self._camera: Any = None
        self._running = False
        spec = env.action_spec()
        low = np.broadcast_to(spec.minimum, spec.shape).astype(np.float64)
        high = np.broadcast_to(spec.maximum, spec.shape).astype(np.float64)
        bounded = np.maximum(np.abs(low), np.abs(high)) < _UNBOUNDED
        self._middle = np.where(bounded, (high + low) / 2, 0.0)
        self._half_range = np.where(bounded, (high - low) / 2, 1.0)
        self.observation_space = Box(0, 255, (3, image_size, image_size), np.uint8)
        self.action_space = Box(-1.0, 1.0, spec.shape, np.float32)
        self.metadata = {
            **self.metadata,
            "render_fps": 1.0 / (env.control_timestep() * action_repeat),
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            if not 0 <= seed < 2**32:
                raise ValueError(f"seed should be in [0, 2**32), got {seed}")
            self._seed(seed)
        with quiet_models():
            self._env.reset()
        self._frame, self._state = self._observe()
        self._running = True
        return self._frame, {"discount": 1.0, "state": self._state}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if not self._running:
            raise RuntimeError("the episode has ended or not begun; call reset() before step()")
        control = self._middle + self._half_range * checked_action(action, self.action_space.shape)
        from dm_control.rl.control import PhysicsError

        info: dict[str, Any] = {}
        reward, discount, last = 0.0, 1.0, False
        try:
            for _ in range(self._action_repeat):
                time_step = self._env.step(control)
                reward += time_step.reward or 0.0
                discount *= time_step.discount
                last = time_step.last()
                if last:
                    break
            self._frame, self._state = self._observe()
        except PhysicsError as error:
            # Nothing true can be drawn of a simulation that diverged: keep the last sound frame.
            _log.warning("the simulation became unstable and the episode was cut: %s", error)
            last, info = True, {"physics_error": str(error)}
        self._running = not last
        terminated = last and discount == 0.0
        info |= {"discount": float(discount), "state": self._state}
        return self._frame, float(reward), terminated, last and not terminated, info

    def render(self) -> np.ndarray:
        """The last frame as uint8 [H, W, 3]."""
        if self._model is None:
            raise RuntimeError("there is no frame yet; call reset() before render()")
        return self._frame.transpose(1, 2, 0)

    def close(self) -> None:
        self._camera = self._model = None
        self._running = False
        self._env.close()

    def _observe(self) -> tuple[np.ndarray, np.ndarray]:
        # A camera is kept from frame to frame (making one costs up to 1 ms), but not past its
        # model: manipulation tasks compile a new one every episode.
        physics = self._env.physics
        if self._model is not physics.model:
            from dm_control.mujoco.engine import Camera

            self._model = physics.model
            # The framebuffer's size is the models' own limit on the picture's.
            global_ = self._model.vis.global_
            global_.offwidth = max(global_.offwidth, self._image_size)
            global_.offheight = max(global_.offheight, self._image_size)
            self._prepare_model(self._model)
            self._camera = Camera(physics, self._image_size, self._image_size, self.camera)
        frame = np.array(self._camera.render().transpose(2, 0, 1), order="C")
        return frame, np.asarray(physics.get_state(), dtype=np.float64)


@contextlib.contextmanager
def quiet_models() -> Iterator[None]:
    """Silences what mujoco says about deprecated attributes in dm_control's own models."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "settotalmass" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
