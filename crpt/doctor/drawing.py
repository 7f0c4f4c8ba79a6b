"""Frames drawn in a process of its own, which imports no torch and so draws at once."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from crpt import envs
from crpt.doctor.finding import Finding
from crpt.envs import rendering

TASK = "cartpole_swingup"
FRAMES = 50


def in_a_process(draw: Callable[[], Finding], patience: float) -> Finding:
    """What it finds, or what became of the process: a GL library may abort or hang."""
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send, args=(send, draw), daemon=True)
    process.start()
    send.close()
    other = "another backend may do: MUJOCO_GL=egl or osmesa"
    try:
        if not receive.poll(patience):
            return Finding("error", f"rendering: no frames within {patience:g} s; {other}")
        finding: Finding = receive.recv()
        return finding
    except EOFError:
        process.join()
        return Finding(
            "error", f"rendering: drawing ended its process, by {process.exitcode}; {other}"
        )
    finally:
        process.kill()
        process.join()
        receive.close()


def _send(send: Connection, draw: Callable[[], Finding]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever waits for this process ends it
    try:
        finding = draw()
    except ImportError as error:  # files that another version's uninstallation took along
        finding = Finding("error", f"rendering: {error}; {rendering.MUJOCO_REMEDY}")
    except Exception as error:
        finding = Finding("error", f"rendering: {error}")
    send.send(finding)


def draw_frames() -> Finding:
    """The backend, its renderer, and frames a second, exact and fast."""
    backend = envs.select_backend()
    speeds = []
    renderer = ""
    for render in ("exact", "fast"):
        env = envs.make(TASK, render=render, action_repeat=1)
        env.reset(seed=0)
        action = env.action_space.sample()
        begun = time.monotonic()
        for _ in range(FRAMES):
            env.step(action)
        speeds.append(f"{FRAMES / (time.monotonic() - begun):.0f} frames/s {render}")
        renderer = renderer or _renderer(env)
        env.close()
    what = f"rendering by {backend}, {renderer}: {TASK} at 84x84 {', '.join(speeds)}"
    # The warning of a GPU that does not draw has been given by then.
    return Finding("note" if rendering.warned else "ok", what)


def _renderer(env: object) -> str:
    """What OpenGL calls itself in the environment's context."""
    from OpenGL import GL

    with env._env.physics.contexts.gl.make_current() as context:  # type: ignore[attr-defined]
        name: bytes | None = context.call(GL.glGetString, GL.GL_RENDERER)
    return "a renderer without a name" if name is None else name.decode()
