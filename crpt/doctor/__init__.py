"""What of this machine crpt can use, and what keeps it from the rest."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

import torch

import crpt
from crpt import _cpu, envs, ops
from crpt.envs import rendering
from crpt.ops import cuda, reference

# What the extras bring, by the name that is imported.
EXTRAS = {
    "report": ("matplotlib", "imageio", "imageio_ffmpeg", "tensorboard"),
    "hub": ("huggingface_hub",),
    "gymnasium": ("pygame", "PIL"),
}
TASK = "cartpole_swingup"
FRAMES = 50


@dataclass(frozen=True)
class Finding:
    """Of one part of the machine."""

    level: Literal["ok", "note", "error"]
    """note: crpt runs without it; error: some of its commands do not."""
    what: str


def findings(draw: Callable[[], str] | None = None) -> Iterator[Finding]:
    """One after the other, as they are found.

    draw: what is to be asked for frames, in a process of its own; none: `draw_frames`.
    """
    yield Finding(
        "ok",
        f"crpt {crpt.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )
    yield _cpu_operators()
    yield from _gpus()
    yield _pair()
    yield _frames(draw or draw_frames)
    yield from _extras()


def _cpu_operators() -> Finding:
    wrong = _wrong_on(torch.device("cpu"))
    if wrong:
        return Finding("error", f"operators on the CPU: {wrong}")
    precision = "bf16" if _cpu.bf16_units else "fp32"
    return Finding(
        "ok",
        f"operators on the CPU: {_cpu.isa} kernels, {len(os.sched_getaffinity(0))} cores, "
        f"{torch.get_num_threads()} threads; --precision auto is {precision}",
    )


def _gpus() -> Iterator[Finding]:
    if torch.version.cuda is None:
        yield Finding("note", "no GPU: this PyTorch is a build for CPUs")
        return
    if not torch.cuda.is_available():
        yield Finding(
            "note",
            f"no GPU: PyTorch's CUDA {torch.version.cuda} finds none that it can use "
            "(nvidia-smi tells the driver's view)",
        )
        return
    if not cuda.AVAILABLE:
        yield Finding(
            "error",
            "operators on GPUs: crpt was built without them, for want of a CUDA compiler; with "
            "nvcc in the PATH, `pip install --force-reinstall --no-deps .` in a checkout",
        )
        return
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        major, minor = torch.cuda.get_device_capability(device)
        name = f"cuda:{number}, {torch.cuda.get_device_name(device)}, sm_{major}{minor}"
        wrong = _wrong_on(device)
        if wrong:
            yield Finding("error", f"operators on {name}: {wrong}")
        else:
            precision = "bf16" if (major, minor) >= (8, 0) else "fp32"
            yield Finding("ok", f"operators on {name}; --precision auto is {precision}")


def _wrong_on(device: torch.device) -> str | None:
    """What is wrong with an operator there; none: it gives what its twin gives."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 24, generator=generator) * 2 - 1
    try:
        codes = ops.sinkhorn(scores.to(device)).cpu()
    except Exception as error:  # a GPU of another architecture, a driver that is too old, ...
        return f"{type(error).__name__}: {error}"
    difference = float((codes - reference.sinkhorn(scores)).abs().max())
    return None if difference < 1e-5 else f"sinkhorn is {difference:.2g} off"


def _pair() -> Finding:
    try:
        rendering.check_versions()
    except rendering.IncompatibleVersionsError as error:
        return Finding("error", str(error))
    return Finding("ok", f"dm_control {version('dm_control')} with mujoco {version('mujoco')}")


def _frames(draw: Callable[[], str]) -> Finding:
    # In a process of its own: a GL library that aborts takes it along.
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return Finding("ok", f"rendering by {pool.submit(draw).result()}")
    except BrokenProcessPool:
        return Finding(
            "error",
            "rendering: the process that drew a frame was killed or aborted; another backend may "
            "do: MUJOCO_GL=egl or osmesa",
        )
    except Exception as error:
        return Finding("error", f"rendering: {error}")


def draw_frames() -> str:
    """The backend, its renderer, and frames a second, exact and fast."""
    backend = envs.select_backend()
    speeds = []
    for render in ("exact", "fast"):
        env = envs.make(TASK, render=render, action_repeat=1)
        env.reset(seed=0)
        action = env.action_space.sample()
        begun = time.monotonic()
        for _ in range(FRAMES):
            env.step(action)
        speeds.append(f"{FRAMES / (time.monotonic() - begun):.0f} frames/s {render}")
        renderer = _renderer(env)
        env.close()
    return f"{backend}, {renderer}: {TASK} at 84x84 {', '.join(speeds)}"


def _renderer(env: object) -> str:
    """What OpenGL calls itself in the environment's context."""
    from OpenGL import GL

    with env._env.physics.contexts.gl.make_current() as context:  # type: ignore[attr-defined]
        return str(context.call(GL.glGetString, GL.GL_RENDERER).decode())


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            yield Finding(
                "note", f'extra {extra}: without {", ".join(missing)}; pip install "crpt[{extra}]"'
            )
        else:
            yield Finding("ok", f"extra {extra}")
