"""Environments by name: dm_control's suite, the `_vision` tasks of dm_control.manipulation, and
Gymnasium's ids."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any, Literal, get_args

import gymnasium
import numpy as np

from crpt.envs.dm_control_env import DMControlEnv, quiet_models
from crpt.envs.gymnasium_env import GymnasiumEnv, find_spec, is_gymnasium_id
from crpt.envs.rendering import select_backend

Render = Literal["exact", "fast"]
_SUITE_CAMERAS = {"quadruped": 2}  # the others: 0
_MANIPULATION_CAMERA = "front_close"


def make(
    domain: str, *, render: Render = "exact", action_repeat: int = 2, image_size: int = 84
) -> gymnasium.Env:
    """An environment of frames, uint8 [3, H, W], and of actions in [-1, 1], by its name.

    Args:
        domain: a task of dm_control's suite (`cheetah_run`, `ball_in_cup_catch`), a `_vision` task
            of its manipulation (`stack_2_bricks_vision`), or the id of a Gymnasium environment that
            renders (`Pendulum-v1`, `ale_py:ALE/Pong-v5`); see `DMControlEnv` and `GymnasiumEnv`.
        render: `exact` gives dm_control's own pixels; `fast` leaves out shadows and multisampling,
            which is several times faster in software and gives other pixels. Gymnasium's
            environments draw as they do.
        action_repeat: environment steps per agent step, each with the same action.
        image_size: height and width of a frame, in pixels.

    Raises:
        TypeError, ValueError: an argument of another type, an unknown name or a value out of range.
        RenderingUnavailableError: no OpenGL backend works here, or a package to draw with is
            missing.
    """
    _check_arguments(domain, render, action_repeat, image_size)
    if is_gymnasium_id(domain):
        return GymnasiumEnv(domain, action_repeat=action_repeat, image_size=image_size)
    select_backend()
    prepare = _leave_out_shadows_and_multisampling if render == "fast" else lambda model: None
    common: dict[str, Any] = {
        "action_repeat": action_repeat,
        "image_size": image_size,
        "prepare_model": prepare,
    }
    tasks = _suite_tasks()
    if domain in tasks:
        from dm_control import suite

        name, task = tasks[domain]
        with quiet_models():
            # Some models are drawn at random when they are made (lqr): always the same one.
            env = suite.load(name, task, task_kwargs={"random": 0})
        env.task.random.seed()
        return DMControlEnv(env, env.task.random.seed, camera=_SUITE_CAMERAS.get(name, 0), **common)
    if domain in _vision_tasks():
        from dm_control import manipulation

        with quiet_models():
            env = manipulation.load(domain)
        # The task would draw its observations at every physics step; frames are drawn here instead.
        for observable in env.task.observables.values():
            observable.enabled = False
        return DMControlEnv(
            env, partial(_seed_manipulation, env), camera=_MANIPULATION_CAMERA, **common
        )
    raise ValueError(_unknown(domain))


def known_names() -> list[str]:
    """dm_control's names that `make` takes. Chooses the rendering backend, since it imports
    dm_control."""
    select_backend()
    return [*_suite_tasks(), *_vision_tasks()]


def require_known(domain: str) -> None:
    """Raises the ValueError that `make` would raise for an unknown name."""
    if is_gymnasium_id(domain):
        find_spec(domain)
    elif domain not in known_names():
        raise ValueError(_unknown(domain))


def _suite_tasks() -> dict[str, tuple[str, str]]:
    from dm_control import suite

    return {f"{name}_{task}": (name, task) for name, task in suite.ALL_TASKS}


def _vision_tasks() -> list[str]:
    from dm_control import manipulation

    names: list[str] = manipulation.get_environments_by_tag("vision")
    return names


def _check_arguments(domain: str, render: str, action_repeat: int, image_size: int) -> None:
    if not isinstance(domain, str):
        raise TypeError(f"domain should be a str, got {type(domain).__name__}")
    if render not in get_args(Render):
        raise ValueError(f"render should be exact or fast, got {render!r}")
    for name, value in (("action_repeat", action_repeat), ("image_size", image_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} should be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} should be at least 1, got {value}")


def _unknown(domain: str) -> str:
    names = known_names()
    close = difflib.get_close_matches(domain, [*names, *gymnasium.registry], n=5, cutoff=0.5)
    hint = f"close to it: {', '.join(close)}" if close else f"known: {', '.join(names)}"
    return (
        f"domain should be the name of a dm_control task or a Gymnasium id, got {domain!r}; {hint}"
    )


def _seed_manipulation(env: Any, seed: int) -> None:
    env.random_state.seed(seed)
    # The reassemble tasks shuffle these in place, so that an episode would depend on those before.
    for name in ("_initial_order", "_desired_order"):
        order = getattr(env.task, name, None)
        if order is not None:
            setattr(env.task, name, np.sort(order))


def _leave_out_shadows_and_multisampling(model: Any) -> None:
    model.vis.quality.shadowsize = 0
    model.vis.quality.offsamples = 0
