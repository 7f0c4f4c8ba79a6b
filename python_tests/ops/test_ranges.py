"""Temperatures and offsets that the type computed in cannot hold, or not their inverse: one rule on
every device, in the fakes and for the processes of a group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operator_samples import FLOATS
from torch import Tensor

from crpt import ops

ROWS, UNITS, CODES = torch.randn(4, 3), torch.eye(5, 3), torch.rand(4, 5).softmax(-1)
DIVIDES: dict[str, tuple[str, Callable[[Callable[[Tensor], Tensor], float], Tensor]]] = {
    "sinkhorn": ("temperature", lambda to, t: ops.sinkhorn(to(CODES), t)),
    "prototype_loss": ("temperature", lambda to, t: ops.prototype_loss(to(CODES), to(CODES), t)),
    "prototype_objective": (
        "temperature",
        lambda to, t: ops.prototype_objective(to(ROWS), to(UNITS), to(CODES), t)[0],
    ),
    "prototype_objective, offset": (
        "offset",
        lambda to, x: ops.prototype_objective(to(ROWS), to(UNITS), to(CODES), offset=x)[0],
    ),
    "intrinsic_loss": ("offset", lambda to, x: ops.intrinsic_loss(to(UNITS), x)),
}

divides = pytest.mark.parametrize("case", DIVIDES)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    power = 1022 if dtype == torch.float64 else 126
    return 2.0**-power, 2.0**power


@divides
@dtypes
@pytest.mark.parametrize("beyond", [0.999, 0.3])
def test_out_of_range(case: str, dtype: torch.dtype, beyond: float, device: str) -> None:
    name, function = DIVIDES[case]
    least, most = bounds(dtype)
    compute = "float64" if dtype == torch.float64 else "float32"
    for value in (least * beyond, most / beyond):
        expected = f"{name} should be in .*, where {compute} holds it and its inverse, got {value}"
        for where in (device, "meta"):
            with pytest.raises(ValueError, match=expected.replace("+", r"\+")):
                function(lambda x, where=where: x.to(where, dtype), value)


@divides
@dtypes
def test_at_the_bounds(case: str, dtype: torch.dtype, device: str) -> None:
    """What the value divides is finite there, also in a narrower type where that can be."""
    _, function = DIVIDES[case]
    for value in bounds(dtype):
        result = function(lambda x: x.to(device, dtype), value)
        if dtype in (torch.float32, torch.float64) or case == "sinkhorn":
            assert not result.isnan().any()
