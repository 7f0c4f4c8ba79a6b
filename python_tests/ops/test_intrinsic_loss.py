from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crpt import ops


def units(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 20), st.floats(1.1, 5.0))
def test_the_gradient_is_the_formula(seed: int, m: int, d: int, offset: float) -> None:
    """dL/dc_j = 1/M^2 sum_{i != j} c_i / (s_ij + offset), row by row as it is written."""
    c = units(seed, m, d).requires_grad_()
    ops.intrinsic_loss(c, offset).backward()
    rows = c.detach()
    for j in range(m):
        expected = torch.zeros(d, dtype=torch.float64)
        for i in range(m):
            if i != j:
                expected += rows[i] / (rows[i] @ rows[j] + offset) / m**2
        torch.testing.assert_close(c.grad[j], expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 20))
def test_invariant_to_permutations_and_rotations(seed: int, m: int, d: int) -> None:
    c = units(seed, m, d)
    loss = ops.intrinsic_loss(c)
    torch.testing.assert_close(ops.intrinsic_loss(c[torch.randperm(m)]), loss)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    torch.testing.assert_close(ops.intrinsic_loss(c @ rotation), loss)


def test_known_values(device: str) -> None:
    identical = torch.ones(4, 1, device=device)
    assert ops.intrinsic_loss(identical).item() == pytest.approx(12 / 16 / 2.5)
    orthogonal = torch.eye(5, device=device)
    assert ops.intrinsic_loss(orthogonal).item() == 0
    assert ops.intrinsic_loss(torch.ones(1, 3, device=device)).item() == 0


def test_following_the_gradient_spreads_prototypes(device: str) -> None:
    c = F.normalize(
        torch.ones(16, 4, device=device) + 0.1 * torch.randn(16, 4, device=device), dim=-1
    )
    before = (c @ c.mT).mean()
    for _ in range(100):
        c = c.detach().requires_grad_()
        (grad,) = torch.autograd.grad(ops.intrinsic_loss(c), c)
        c = F.normalize(c - grad, dim=-1)
    assert (c @ c.mT).mean() < before - 0.5


def test_nan_stays_nan(device: str) -> None:
    c = torch.randn(2, 4, 3, device=device)
    c[1, 0, 0] = torch.nan
    loss = ops.intrinsic_loss(c, 100.0)
    assert loss[0].isfinite()
    assert loss[1].isnan()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((3,), TypeError, "prototypes should be a Tensor, got int"),
        ((torch.ones(2, 2, dtype=torch.bool),), TypeError, "prototypes should be float32, float16, bfloat16, float64, got torch.bool"),
        ((torch.ones(3),), ValueError, r"prototypes should be \[..., M, D\] with M, D >= 1, got \[3\]"),
        ((torch.ones(0, 3),), ValueError, r"got \[0, 3\]"),
        ((torch.ones(3, 0),), ValueError, r"got \[3, 0\]"),
        ((torch.ones(3, 3), 0.0), ValueError, "offset should be positive and finite, got 0.0"),
        ((torch.ones(3, 3), "1.5"), TypeError, "offset should be a float, got str"),
    ],
)  # fmt: skip
def test_errors(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.intrinsic_loss(*args)
