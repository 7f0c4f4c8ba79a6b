"""The rows of `python -m crpt.bench ops`: to add one, write what it takes and list it in `rows`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crpt import ops
from crpt.bench import usual
from crpt.bench.limits import Work
from crpt.bench.machine import last_level_cache
from crpt.bench.timing import Inputs
from crpt.ops import reference

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "uint8"}


@dataclass(frozen=True)
class Usual:
    """The named alternative."""

    name: str
    call: Callable[..., Any]
    prepare: Callable[..., Inputs] | None = None
    """What it is called on, made of the row's inputs and not timed; None: the same inputs."""
    same: bool = True
    """Whether it computes what the row does (a plain copy does not)."""


@dataclass(frozen=True)
class Row:
    """One line of the table: an operator on one kind of problem."""

    operator: str
    size: str
    dtype: torch.dtype
    make: Callable[[torch.Generator], Inputs]
    """Fresh random inputs on the generator's device."""
    ours: Callable[..., Any]
    twin: Callable[..., Any]
    usual: Usual
    work: Work
    reads: int
    """Bytes of one set of inputs that a call reads, at least."""
    backward: bool = False
    """Time the gradients of all inputs that require them along with the loss."""
    tolerance: float = 1e-4
    """How near ours should be to the twin, relatively; a tenth of it in units of the largest
    element is near enough. 0: equal, bit for bit."""

    @property
    def name(self) -> str:
        return f"{self.operator} {self.size} {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]


def rows(shrink: int = 1) -> tuple[Row, ...]:
    """All rows, each with its sizes divided by `shrink`, for tests."""

    def n(size: int) -> int:
        return max(size // shrink, 6)

    images = (n(512), 9, n(84), n(84))
    frames = (n(8000), 3, n(84), n(84))  # or more, where the caches are large
    return (
        sinkhorn(n(512), n(512)),
        sinkhorn(max(8 // shrink, 2), n(512), n(512)),
        sinkhorn(max(64 // shrink, 3), n(256), n(512)),
        prototype_loss(n(512), n(512)),
        prototype_loss(n(4096), n(2048)),
        intrinsic_loss(n(512), n(128)),
        objective(n(512), n(128), n(512)),
        random_shift(images, torch.uint8),
        random_shift(images, torch.float32),
        *(
            frame_stack(frames, n(512), dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.uint8)
        ),
        knn_distance(n(512), n(2048), n(128)),
        knn_distance(n(512), n(2048), n(128), distance=1e-3),
    )


def sinkhorn(*shape: int) -> Row:
    return Row(
        "sinkhorn",
        _by(*shape),
        torch.float32,
        lambda g: (_cosines(g, *shape),),
        ops.sinkhorn,
        reference.sinkhorn,
        Usual("exp-space Sinkhorn, eager", usual.sinkhorn),
        Work(2 * 4 * _product(shape)),
        4 * _product(shape),
    )


def prototype_loss(batch: int, prototypes: int) -> Row:
    def make(g: torch.Generator) -> Inputs:
        codes = torch.randn(batch, prototypes, generator=g, device=g.device).softmax(-1)
        return _cosines(g, batch, prototypes).requires_grad_(), codes

    return Row(
        "prototype_loss",
        _by(batch, prototypes),
        torch.float32,
        make,
        ops.prototype_loss,
        reference.prototype_loss,
        Usual("F.cross_entropy with soft targets", usual.prototype_loss),
        Work(3 * 4 * batch * prototypes),
        2 * 4 * batch * prototypes,
        backward=True,
    )


def intrinsic_loss(prototypes: int, dim: int) -> Row:
    return Row(
        "intrinsic_loss",
        _by(prototypes, dim),
        torch.float32,
        lambda g: (_units(g, prototypes, dim).requires_grad_(),),
        ops.intrinsic_loss,
        reference.intrinsic_loss,
        Usual("vectorised, eager", usual.intrinsic_loss),
        # C C^T, and the weights times C.
        Work(2 * 4 * prototypes * dim, 2 * 2 * prototypes**2 * dim),
        4 * prototypes * dim,
        backward=True,
    )


def objective(batch: int, dim: int, prototypes: int) -> Row:
    """From the (online, target) embeddings to the loss and its gradients."""

    def make(g: torch.Generator) -> Inputs:
        online = torch.randn(batch, dim, generator=g, device=g.device).requires_grad_()
        target = torch.randn(batch, dim, generator=g, device=g.device)
        return online, target, _units(g, prototypes, dim).requires_grad_()

    def compute(m: Any, online: Tensor, target: Tensor, c: Tensor) -> Tensor:
        with torch.no_grad():
            codes = m.sinkhorn(m.prototype_similarity(target, c))  # which normalises
        loss: Tensor = m.prototype_objective(online, c, codes)[0]
        return loss

    scores, embeddings, rows_of_c = batch * prototypes * dim, batch * dim, prototypes * dim
    return Row(
        "objective",
        _by(batch, dim, prototypes),
        torch.float32,
        make,
        partial(compute, ops),
        partial(compute, reference),
        Usual("the same in plain PyTorch, exp-space Sinkhorn", usual.objective),
        # t C^T, s C^T and its two gradients; C C^T and its one.
        Work(4 * (3 * embeddings + 2 * rows_of_c), 2 * (4 * scores + 2 * prototypes * rows_of_c)),
        4 * (2 * embeddings + rows_of_c),
        backward=True,
    )


def random_shift(shape: tuple[int, int, int, int], dtype: torch.dtype, pad: int = 4) -> Row:
    def make(g: torch.Generator) -> Inputs:
        images = _pixels(g, *shape)
        if dtype != torch.uint8:
            images = images.to(dtype) / 255
        return images, pad, _shifts(g, shape[0], pad)

    return Row(
        "random_shift",
        _by(*shape),
        dtype,
        make,
        ops.random_shift,
        reference.random_shift,
        Usual("DrQ's shift: pad, bilinear grid_sample (float32)", usual.random_shift),
        Work(2 * dtype.itemsize * _product(shape)),
        dtype.itemsize * _product(shape),
        tolerance=0.0,
    )


def frame_stack(
    frames: tuple[int, int, int, int], batch: int, dtype: torch.dtype, stack: int = 3, pad: int = 4
) -> Row:
    _, channels, height, width = frames
    out = (batch, stack * channels, height, width)

    def make(g: torch.Generator) -> Inputs:
        store = _store(frames, g.device)
        index = torch.randint(len(store), (batch, stack), generator=g, device=g.device)
        return store, index, _shifts(g, batch, pad), pad, dtype

    def copy(store: Tensor, index: Tensor, *_: Any) -> Inputs:
        source = store[index].flatten(1, 2)
        return torch.zeros(out, dtype=dtype, device=source.device), source

    return Row(
        "frame_stack",
        _by(batch, stack, *frames[1:]),
        dtype,
        make,
        ops.frame_stack,
        reference.frame_stack,
        Usual("only a copy_ of the stacks, into warm memory", Tensor.copy_, copy, same=False),
        Work((1 + dtype.itemsize) * _product(out)),
        _product(out),
        tolerance=0.0,
    )


def knn_distance(queries: int, keys: int, dim: int, k: int = 3, distance: float = 0.0) -> Row:
    """With a distance: unit rows that lie about so far from each other, as one domain's do."""

    def make(g: torch.Generator) -> Inputs:
        q, c = (torch.randn(n, dim, generator=g, device=g.device) for n in (queries, keys))
        if distance:
            centre = torch.randn(dim, generator=g, device=g.device)
            size = distance * float(centre.norm()) / (2 * dim) ** 0.5
            q, c = (F.normalize(centre + size * x, dim=-1) for x in (q, c))
        return q, c, k

    return Row(
        "knn_distance",
        _by(queries, keys, dim) + (" close" if distance else ""),
        torch.float32,
        make,
        ops.knn_distance,
        reference.knn_distance,
        Usual("cdist + topk", usual.knn_distance, same=not distance),
        Work(4 * (queries * dim + keys * dim + queries), 2 * queries * keys * dim),
        4 * (queries + keys) * dim,
    )


@lru_cache(maxsize=1)
def _store(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """The frames of all input sets: so many, and at least four times what the caches hold."""
    count, *frame = shape
    count = max(count, -(-4 * last_level_cache(device) // _product(tuple(frame))))
    return torch.randint(0, 256, (count, *frame), device=device, dtype=torch.uint8)


def _by(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _cosines(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g, device=g.device) * 2 - 1


def _units(g: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=g, device=g.device), dim=-1)


def _pixels(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=g, device=g.device, dtype=torch.uint8)


def _shifts(g: torch.Generator, batch: int, pad: int) -> Tensor:
    return torch.randint(-pad, pad + 1, (batch, 2), generator=g, device=g.device)
