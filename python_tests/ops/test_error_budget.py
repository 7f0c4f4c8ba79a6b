"""The error against float64 is at most twice that of the same formula, the twin, in the same
precision: values and gradients, for inputs of several kinds.

"Error" is the root of the mean square and the largest, as assert_within_budget has it: both compute
in float32, and so narrower results have no more room than the twin's rounding takes. Losses come in
batches, whose mean error is no matter of luck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_common import assert_within_budget
from torch import Tensor

from crpt import ops
from crpt.ops import gemm, reference

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x,
    # One domain's frames: unit rows that hardly differ.
    "nearly_identical": lambda x: F.normalize(x[..., :1, :] + 1e-3 * x, dim=-1),
    "offset": lambda x: x + 100,
    "huge": lambda x: x * 1e4,
    "tiny": lambda x: x * 1e-4,
    "clusters": lambda x: x[..., torch.arange(x.shape[-2]) % 8, :] + 0.05 * x,
    "low_rank": lambda x: x[..., :2] @ x[..., :2, :],
    "mixed": lambda x: x * torch.logspace(-3, 3, x.shape[-2], dtype=x.dtype)[:, None],
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(kind: str, seed: int, *shape: int) -> Tensor:
    return KINDS[kind](normal(seed, *shape))


def units(kind: str, seed: int, *shape: int) -> Tensor:
    """Prototypes are unit rows; those of other lengths could meet s + offset = 0."""
    return F.normalize(rows(kind, seed, *shape), dim=-1)


def cosines(kind: str, *leading: int) -> Tensor:
    e, c = rows(kind, 0, *leading, 96, 64), rows(kind, 1, *leading, 80, 64)
    return reference.prototype_similarity(e, c)


def objective(
    kind: str, *leading: int, b: int, m: int, d: int, spread: bool = False
) -> tuple[Tensor, ...]:
    """spread: the prototypes are, whatever the embeddings."""
    e = rows(kind, 0, *leading, b, d)
    c = units("gaussian" if spread else kind, 1, *leading, m, d)
    return e, c, reference.sinkhorn(units(kind, 2, *leading, b, d) @ c.mT)


def leaning(kind: str, cosine: float, m: int, d: int) -> Tensor:
    """Unit rows [m, d] that have this cosine with each other on average."""
    own, common = units(kind, 1, m, d), units("gaussian", 2, 1, d)
    return F.normalize(own + (cosine / (1 - cosine)) ** 0.5 * common, dim=-1)


CASES: dict[str, Callable[[str], tuple[tuple[Any, ...], tuple[int, ...]]]] = {
    # Arguments, and which of them are differentiated.
    "sinkhorn of cosines": lambda kind: ((cosines(kind),), ()),
    "sinkhorn": lambda kind: ((rows(kind, 2, 96, 80),), ()),
    "prototype_similarity": lambda kind: (
        (rows(kind, 0, 96, 64), rows(kind, 1, 80, 64)),
        (0, 1),
    ),
    "prototype_loss of cosines": lambda kind: (
        (cosines(kind, 16), reference.sinkhorn(cosines(kind, 16))),
        (0, 1),
    ),
    "prototype_loss": lambda kind: (
        (rows(kind, 2, 16, 96, 80), normal(3, 16, 96, 80).softmax(-1)),
        (0, 1),
    ),
    "prototype_objective": lambda kind: (objective(kind, 16, b=96, m=80, d=64), (0, 1)),
    # Sums over many samples and prototypes, by torch's BLAS in a plane, else by the faster of its two:
    # of whichever the error begins anew after some hundreds of terms.
    "prototype_objective in a plane": lambda kind: (objective(kind, b=164, m=229, d=2), (0, 1)),
    "prototype_objective of many": lambda kind: (objective(kind, b=281, m=272, d=38), (0, 1)),
    "prototype_objective of more": lambda kind: (objective(kind, b=512, m=512, d=128), (0, 1)),
    "prototype_objective of more, spread": lambda kind: (
        objective(kind, b=512, m=512, d=128, spread=True),
        (0, 1),
    ),
    "prototype_objective of many, weight 1": lambda kind: (
        (*objective(kind, b=512, m=512, d=128), 0.1, 1.0),
        (0, 1),
    ),
    "prototype_objective of many, weight 10": lambda kind: (
        (*objective(kind, b=512, m=512, d=128), 0.1, 10.0),
        (0, 1),
    ),
    "intrinsic_loss": lambda kind: ((units(kind, 1, 16, 80, 64),), (0,)),
    "intrinsic_loss of many": lambda kind: ((units(kind, 1, 399, 106),), (0,)),
    "intrinsic_loss of more": lambda kind: ((units(kind, 1, 512, 128),), (0,)),
    "intrinsic_loss of more, leaning": lambda kind: ((leaning(kind, 0.03, 512, 128),), (0,)),
    "prototype_similarity of long rows": lambda kind: (
        (rows(kind, 0, 96, 700), rows(kind, 1, 80, 700)),
        (0, 1),
    ),
    "knn_distance of long rows": lambda kind: (
        (rows(kind, 0, 96, 700), rows(kind, 1, 80, 700), 3),
        (0, 1),
    ),
    "knn_distance": lambda kind: (
        (rows(kind, 0, 96, 64), rows(kind, 1, 80, 64), 3),
        (0, 1),
    ),
}


# Those of the cases with sums of more than 192 terms that need what crpt.ops allows these.
LONG = {
    name
    for name in CASES
    if name.startswith(("prototype_objective of m", "intrinsic_loss of more"))
}


def results(function: Any, args: tuple[Any, ...], wanted: tuple[int, ...]) -> list[Tensor]:
    args = tuple(
        x.detach().requires_grad_(i in wanted) if isinstance(x, Tensor) else x
        for i, x in enumerate(args)
    )
    out = function(*args)
    out = out[0] if isinstance(out, tuple) else out
    if not wanted:
        return [out]
    weight = torch.linspace(0.5, 1.5, out.numel(), device=out.device).reshape(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, [args[i] for i in wanted], weight)]


def terms_of(name: str, args: tuple[Any, ...]) -> tuple[float, ...]:
    """How large the terms are of which value and gradients are made, where these may cancel: in the
    gradient of scores that are all equal p - q over T B."""
    if name != "prototype_loss":
        return (0.0, 0.0, 0.0)
    scores, codes = args
    return (0.0, codes.max().item() / (0.1 * scores.shape[-2]), 0.0)


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
    name = case.replace(",", "").split()[0]
    if name == "knn_distance" and kind == "offset" and dtype == torch.bfloat16:
        wanted = ()  # its neighbours are equally far: any of them is right
    assert all(x.isfinite().all() for x in args if isinstance(x, Tensor))  # in the dtype's range
    got = results(getattr(ops, name), args, wanted)
    twin = results(getattr(reference, name), args, wanted)
    exact = results(getattr(reference, name), exact_args, wanted)
    # As crpt.ops has it of long sums of products; the twin's are always MKL's.
    times = 3 if case in LONG and device == "cpu" and gemm.ONEDNN else 2
    for g, t, e, terms in zip(got, twin, exact, terms_of(name, args), strict=False):
        assert_within_budget(g, t, e, terms, times)
