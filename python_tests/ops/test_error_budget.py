"""The error against float64 is at most twice that of the same formula, the twin, in the same
precision: values and gradients, for inputs of several kinds.

"Error" is the root of the mean square and the largest. Two roundings of the result's dtype are
added, for where the twin happens to be exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crpt import ops
from crpt.ops import reference

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x,
    # One domain's frames: unit rows that hardly differ.
    "nearly_identical": lambda x: F.normalize(x[..., :1, :] + 1e-3 * x, dim=-1),
    "offset": lambda x: x + 100,
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-4,
    "mixed": lambda x: x * torch.logspace(-3, 3, x.shape[-2], dtype=x.dtype)[:, None],
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(kind: str) -> Tensor:
    e, c = KINDS[kind](normal(0, 96, 64)), KINDS[kind](normal(1, 80, 64))
    return reference.prototype_similarity(e, c)


def scaled_to_units(kind: str) -> Tensor:
    """Prototypes are unit rows; those of other lengths could meet s + offset = 0."""
    return F.normalize(KINDS[kind](normal(1, 80, 64)), dim=-1)


CASES: dict[str, Callable[[str], tuple[tuple[Any, ...], tuple[int, ...]]]] = {
    # Arguments, and which of them are differentiated.
    "sinkhorn of cosines": lambda kind: ((cosines(kind),), ()),
    "sinkhorn": lambda kind: ((KINDS[kind](normal(2, 96, 80)),), ()),
    "prototype_similarity": lambda kind: (
        (KINDS[kind](normal(0, 96, 64)), KINDS[kind](normal(1, 80, 64))),
        (0, 1),
    ),
    "prototype_loss of cosines": lambda kind: (
        (cosines(kind), reference.sinkhorn(cosines(kind))),
        (0, 1),
    ),
    "prototype_loss": lambda kind: (
        (KINDS[kind](normal(2, 96, 80)), normal(3, 96, 80).softmax(-1)),
        (0, 1),
    ),
    "intrinsic_loss": lambda kind: ((scaled_to_units(kind),), (0,)),
    "knn_distance": lambda kind: (
        (KINDS[kind](normal(0, 96, 64)), KINDS[kind](normal(1, 80, 64)), 3),
        (0, 1),
    ),
}


def results(function: Any, args: tuple[Any, ...], wanted: tuple[int, ...]) -> list[Tensor]:
    args = tuple(
        x.detach().requires_grad_(i in wanted) if isinstance(x, Tensor) else x
        for i, x in enumerate(args)
    )
    out = function(*args)
    if not wanted:
        return [out.double()]
    weight = torch.linspace(0.5, 1.5, out.numel(), device=out.device).reshape(out.shape).to(out)
    grads = torch.autograd.grad(out, [args[i] for i in wanted], weight)
    return [out.detach().double(), *(g.double() for g in grads)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
def test_error_is_at_most_twice_the_twins(
    case: str, kind: str, dtype: torch.dtype, device: str
) -> None:
    args, wanted = CASES[case](kind)
    args = tuple(x.to(device, dtype) if isinstance(x, Tensor) else x for x in args)
    exact_args = tuple(x.double() if isinstance(x, Tensor) else x for x in args)
    name = case.split()[0]
    if name == "knn_distance" and kind == "offset" and dtype == torch.bfloat16:
        wanted = ()  # its neighbours are equally far: any of them is right
    assert all(x.isfinite().all() for x in args if isinstance(x, Tensor))  # in the dtype's range
    got = results(getattr(ops, name), args, wanted)
    twin = results(getattr(reference, name), args, wanted)
    exact = results(getattr(reference, name), exact_args, wanted)
    eps = torch.finfo(dtype).eps
    for which, g, t, e in zip(("value", "first", "second"), got, twin, exact, strict=False):
        # At least that of the terms that cancel where all scores are equal: q / (T B).
        scale = e.abs().max().clamp_min(1e-6)
        for measure in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            error, twins_error = measure(g - e), measure(t - e)
            assert error <= 2 * twins_error + eps * scale, (
                f"{which}: error {error:.3g}, the twin's {twins_error:.3g}, scale {scale:.3g}"
            )
