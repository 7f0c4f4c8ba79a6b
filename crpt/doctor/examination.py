"""What of this machine crpt can use, and what keeps it from the rest."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Literal

import torch

import crpt
from crpt import envs, ops
from crpt.envs import rendering
from crpt.envs.egl import kernel_has_gpu
from crpt.ops import cuda, reference
from crpt.ops.compiled import _cpu

# What the extras bring, by the name that is imported.
EXTRAS = {
    "report": ("matplotlib", "imageio", "imageio_ffmpeg", "tensorboard"),
    "hub": ("huggingface_hub",),
    "gymnasium": ("pygame", "PIL"),
}
TASK = "cartpole_swingup"
FRAMES = 50
PATIENCE = 120  # seconds for as many frames, and for imports before them


@dataclass(frozen=True)
class Finding:
    """Of one part of the machine."""

    level: Literal["ok", "note", "error"]
    """note: crpt runs all the same; error: some of its commands do not."""
    what: str


def findings(
    draw: Callable[[], Finding] | None = None, patience: float = PATIENCE
) -> Iterator[Finding]:
    """One after the other, as they are found.

    draw: what is asked for frames, in a process of its own; none: `draw_frames`.
    patience: seconds that it may take.
    """
    yield Finding(
        "ok",
        f"crpt {crpt.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )
    yield _cpu_operators()
    yield from _gpus()
    pair = _pair()
    yield pair
    if pair.level != "error":
        yield _in_a_process(draw or draw_frames, patience)
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
        there = "the machine's GPU is not used" if kernel_has_gpu() else "no GPU"
        yield Finding("note", f"{there}: torch {torch.__version__} was built without CUDA")
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
        yield _gpu(torch.device("cuda", number))


def _gpu(device: torch.device) -> Finding:
    try:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{device}, {torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    except Exception as error:  # busy, or broken: the other parts are to be told all the same
        return Finding("error", f"operators on {device}: {type(error).__name__}: {error}")
    wrong = _wrong_on(device)
    if wrong:
        return Finding("error", f"operators on {name}: {wrong}")
    precision = "bf16" if (major, minor) >= (8, 0) else "fp32"
    return Finding("ok", f"operators on {name}; --precision auto is {precision}")


def _wrong_on(device: torch.device) -> str | None:
    """What is wrong with losses and gradients there; none: they are those of the twins."""
    generator = torch.Generator().manual_seed(0)
    e, c = (torch.randn(n, 16, generator=generator).to(device) for n in (40, 24))

    def computed(module: object) -> list[torch.Tensor]:
        embeddings = e.clone().requires_grad_()
        similarity = module.prototype_similarity(embeddings, c)  # type: ignore[attr-defined]
        codes = module.sinkhorn(similarity.detach())  # type: ignore[attr-defined]
        loss = module.prototype_loss(similarity, codes)  # type: ignore[attr-defined]
        return [codes, loss.detach(), *torch.autograd.grad(loss, [embeddings])]

    try:
        pairs = zip(computed(ops), computed(reference), strict=True)
        difference = max(float((ours - twins).abs().max()) for ours, twins in pairs)
    except Exception as error:  # a GPU of another architecture, a driver that is too old, ...
        return f"{type(error).__name__}: {error}"
    return None if difference < 1e-4 else f"they are {difference:.2g} off their twins"


def _pair() -> Finding:
    try:
        rendering.check_versions()
    except rendering.IncompatibleVersionsError as error:
        return Finding("error", str(error))
    found = {name: version(name) for name in ("dm_control", "mujoco")}
    both = " with ".join(f"{name} {number}" for name, number in found.items())
    tested = found["dm_control"] == "1.0.50" and found["mujoco"].startswith("3.17.")
    if not tested:
        return Finding("note", f"{both}; tested are dm_control 1.0.50 with mujoco 3.17")
    return Finding("ok", both)


def _in_a_process(draw: Callable[[], Finding], patience: float) -> Finding:
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


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            yield Finding(
                "note", f'extra {extra}: without {", ".join(missing)}; pip install "crpt[{extra}]"'
            )
        else:
            yield Finding("ok", f"extra {extra}")
