"""What of this machine crpt can use, and what keeps it from the rest."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec

import torch

import crpt
from crpt import ops
from crpt.doctor.drawing import draw_frames, in_a_process
from crpt.doctor.finding import Finding
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
PATIENCE = 120  # seconds for as many frames, and for imports before them


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
        yield in_a_process(draw or draw_frames, patience)
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


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            yield Finding(
                "note", f'extra {extra}: without {", ".join(missing)}; pip install "crpt[{extra}]"'
            )
        else:
            yield Finding("ok", f"extra {extra}")
