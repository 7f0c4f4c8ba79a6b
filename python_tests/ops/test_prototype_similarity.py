from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crpt import ops
from crpt.ops import reference


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 30), st.integers(1, 40))
def test_cosines_are_bounded_symmetric_and_blind_to_length(
    seed: int, b: int, m: int, d: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    e, c = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (b, m))
    similarity = ops.prototype_similarity(e, c)
    assert similarity.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(ops.prototype_similarity(c, e), similarity.mT)
    torch.testing.assert_close(ops.prototype_similarity(3 * e, 0.2 * c), similarity)
    torch.testing.assert_close(ops.prototype_similarity(-e, c), -similarity)
    torch.testing.assert_close(ops.prototype_similarity(e, e).diagonal(), torch.ones(b).double())


def test_zero_rows_are_at_right_angles_to_everything(device: str) -> None:
    e = torch.zeros(2, 5, device=device, requires_grad=True)
    similarity = ops.prototype_similarity(e, torch.randn(3, 5, device=device))
    assert torch.equal(similarity, torch.zeros_like(similarity))
    similarity.sum().backward()
    assert e.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e4, 1e15])
def test_huge_and_tiny_rows(scale: float, device: str) -> None:
    e, c = torch.randn(6, 20, device=device), torch.randn(7, 20, device=device)
    got = ops.prototype_similarity(e * scale, c)
    torch.testing.assert_close(got, reference.prototype_similarity(e * scale, c))


def test_rows_whose_squares_overflow_are_like_nothing(device: str) -> None:
    rows = torch.tensor([[1e19, 0.0], [2e19, 0.0]], device=device)
    for function in (ops.prototype_similarity, reference.prototype_similarity):
        assert function(rows, rows).tolist() == [[1, 0], [0, 0]]


def test_inside_autocast_the_dtype_of_the_inputs_decides() -> None:
    e, c = torch.randn(4, 8), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.prototype_similarity(e, c)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, ops.prototype_similarity(e, c), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1.0, torch.ones(2, 3)), TypeError, "embeddings should be a Tensor, got float"),
        ((torch.ones(2, 3), None), TypeError, "prototypes should be a Tensor, got NoneType"),
        ((torch.ones(2, 3), torch.ones(2, 3).double()), TypeError, "prototypes should be torch.float32 like embeddings, got torch.float64"),
        ((torch.ones(2, 3).int(), torch.ones(2, 3)), TypeError, "embeddings should be float32"),
        ((torch.ones(3), torch.ones(2, 3)), ValueError, r"embeddings should be \[..., B, D\] with D >= 1, got \[3\]"),
        ((torch.ones(2, 0), torch.ones(2, 0)), ValueError, r"embeddings should be \[..., B, D\] with D >= 1, got \[2, 0\]"),
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"prototypes should be \[..., M, 3\] with M >= 1, got \[2, 4\]"),
        ((torch.ones(2, 3), torch.ones(0, 3)), ValueError, r"prototypes should be \[..., M, 3\] with M >= 1, got \[0, 3\]"),
        ((torch.ones(4, 2, 3), torch.ones(5, 2, 3)), ValueError, r"leading dimensions that broadcast with \[4\], got \[5\]"),
        ((torch.ones(2, 3), torch.ones(2, 3, device="meta")), ValueError, "prototypes should be on cpu, got meta"),
    ],
)  # fmt: skip
def test_errors(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.prototype_similarity(*args)


def test_the_unit_rows_of_the_dispatchers_operator_have_their_gradient(device: str) -> None:
    """Nothing public returns them, but a gradient that reaches them is not dropped either."""
    e = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    c = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    similarity, unit_e, unit_c, _, _ = torch.ops.crpt.prototype_similarity(e, c)
    weights = [torch.randn_like(x) for x in (similarity, unit_e, unit_c)]
    plain = (reference.prototype_similarity(e, c), F.normalize(e, dim=-1), F.normalize(c, dim=-1))
    for chosen in ((0, 1, 2), (1,), (2,), (0, 2)):
        outputs, twins = ([xs[i] for i in chosen] for xs in ((similarity, unit_e, unit_c), plain))
        into = [x for x, i in ((e, 1), (c, 2)) if 0 in chosen or i in chosen]
        got, expected = (
            torch.autograd.grad(ys, into, [weights[i] for i in chosen], retain_graph=True)
            for ys in (outputs, twins)
        )
        for g, x in zip(got, expected, strict=True):
            torch.testing.assert_close(g, x)
