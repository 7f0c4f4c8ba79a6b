"""Environments by name: dm_control's suite, and the `_vision` tasks of dm_control.manipulation."""

from __future__ import annotations

import difflib
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from crpt.envs.dm_control_env import DMControlEnv, quiet_models
from crpt.envs.rendering import select_backend

if TYPE_CHECKING:
    import gymnasium

Render = Literal["exact", "fast"]
_SUITE_CAMERAS = {"quadruped": 2}  # the others: 0
_MANIPULATION_CAMERA = "front_close"


def make(
    domain: str, *, render: Render = "exact", action_repeat: int = 2, image_size: int = 84
) -> gymnasium.Env:
    """An environment of frames, uint8 [3, H, W], by the name of a dm_control task.

    Args:
        domain: a task of the suite (`cheetah_run`, `ball_in_cup_catch`) or a `_vision` task of
            manipulation (`stack_2_bricks_vision`).
        render: `exact` gives dm_control's own pixels; `fast` leaves out shadows and multisampling,
            which is several times faster in software and gives other pixels.
        action_repeat: environment steps per agent step, each with the same action.
        image_size: height and width of a frame, in pixels.

    Raises:
        TypeError, ValueError: an argument of another type, an unknown name or a value out of range.
        RenderingUnavailableError: no OpenGL backend works here.
    """
    _check_arguments(domain, render, action_repeat, image_size)
    select_backend()
    from dm_control import manipulation, suite

    prepare = _leave_out_shadows_and_multisampling if render == "fast" else lambda model: None
    common: dict[str, Any] = {
        "action_repeat": action_repeat,
        "image_size": image_size,
        "prepare_model": prepare,
    }
    tasks = _suite_tasks()
    if domain in tasks:
        name, task = tasks[domain]
        with quiet_models():
            # Some models are drawn at random when they are made (lqr): always the same one.
            env = suite.load(name, task, task_kwargs={"random": 0})
        env.task.random.seed()
        return DMControlEnv(env, env.task.random.seed, camera=_SUITE_CAMERAS.get(name, 0), **common)
    if domain in manipulation.get_environments_by_tag("vision"):
        with quiet_models():
            env = manipulation.load(domain)
        # The task would draw its observations at every physics step; frames are drawn here instead.
        for observable in env.task.observables.values():
            observable.enabled = False
        return DMControlEnv(
            env, partial(_seed_manipulation, env), camera=_MANIPULATION_CAMERA, **common
        )
    raise ValueError(_unknown(domain, known_names()))


def known_names() -> list[str]:
    """All names that `make` takes. Chooses the rendering backend, since it imports dm_control."""
    select_backend()
    from dm_control import manipulation

    return [*_suite_tasks(), *manipulation.get_environments_by_tag("vision")]


def require_known(domain: str) -> None:
    """Raises the ValueError that `make` would raise for an unknown name."""
    names = known_names()
    if domain not in names:
        raise ValueError(_unknown(domain, names))


def _suite_tasks() -> dict[str, tuple[str, str]]:
    from dm_control import suite

    return {f"{name}_{task}": (name, task) for name, task in suite.ALL_TASKS}


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


def _unknown(domain: str, names: list[str]) -> str:
    close = difflib.get_close_matches(domain, names, n=5, cutoff=0.5)
    hint = f"close to it: {', '.join(close)}" if close else f"known: {', '.join(names)}"
    return f"domain should be the name of a dm_control task, got {domain!r}; {hint}"


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
