from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crpt import ops
from crpt.ops import reference

relaxed = settings(deadline=None, max_examples=40)


@relaxed
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 40), st.floats(-50, 50))
def test_bounds_and_invariances(seed: int, b: int, m: int, constant: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(b, m, generator=g, dtype=torch.float64) * 2 - 1
    codes = torch.rand(b, m, generator=g, dtype=torch.float64).softmax(-1)
    loss = ops.prototype_loss(scores, codes)
    # Cross-entropy is at least the entropy of the codes, with equality at the codes themselves.
    entropy = -(codes * codes.log()).sum(-1).mean()
    assert loss >= entropy - 1e-9
    torch.testing.assert_close(ops.prototype_loss(0.1 * codes.log(), codes), entropy)
    torch.testing.assert_close(ops.prototype_loss(scores + constant, codes), loss)
    columns = torch.randperm(m)
    torch.testing.assert_close(ops.prototype_loss(scores[:, columns], codes[:, columns]), loss)
    torch.testing.assert_close(ops.prototype_loss(scores, 3 * codes), 3 * loss)


def test_equal_scores_are_the_trivial_solution(device: str) -> None:
    loss = ops.prototype_loss(
        torch.zeros(7, 512, device=device), torch.full((7, 512), 1 / 512, device=device)
    )
    assert loss.item() == pytest.approx(math.log(512), rel=1e-6)


def test_leading_dimensions_are_separate_problems(device: str) -> None:
    scores = torch.rand(3, 2, 5, 6, device=device)
    codes = torch.rand(3, 2, 5, 6, device=device)
    loss = ops.prototype_loss(scores, codes)
    assert loss.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            assert torch.equal(loss[i, j], ops.prototype_loss(scores[i, j], codes[i, j]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_outside_the_range_of_exp(dtype: torch.dtype, device: str) -> None:
    scores = (torch.randn(8, 30, device=device) * 1e3).to(dtype).requires_grad_()
    codes = torch.rand(8, 30, device=device).softmax(-1).to(dtype)
    loss = ops.prototype_loss(scores, codes)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()
    torch.testing.assert_close(loss, reference.prototype_loss(scores, codes), rtol=1e-2, atol=0)


def test_nan_stays_nan(device: str) -> None:
    scores, codes = torch.rand(2, 3, 4, device=device), torch.rand(2, 3, 4, device=device)
    scores[1, 0, 0] = torch.nan
    loss = ops.prototype_loss(scores, codes)
    assert loss[0].isfinite()
    assert loss[1].isnan()


def test_the_gradient_of_the_scores_sums_to_zero(device: str) -> None:
    scores = torch.rand(6, 50, device=device, dtype=torch.float64, requires_grad=True)
    codes = torch.rand(6, 50, device=device, dtype=torch.float64)
    ops.prototype_loss(scores, codes).backward()
    torch.testing.assert_close(
        scores.grad.sum(-1), torch.zeros(6, device=device).double(), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_both_ways_to_the_gradient_agree(dtype: torch.dtype, device: str) -> None:
    """From the pass that computed the loss, and in one of its own."""
    scores = (torch.rand(2, 9, 33, device=device) * 2 - 1).to(dtype)
    codes = torch.rand(2, 9, 33, device=device).softmax(-1).to(dtype)
    grad = torch.tensor([3.0, -0.5], device=device, dtype=dtype)
    operators = torch.ops.crpt
    loss, logsumexp, grad_scores = operators.prototype_loss(scores, codes, 0.1, True)
    apart = operators.prototype_loss(scores, codes, 0.1, False)
    torch.testing.assert_close((loss, logsumexp), apart[:2])
    assert apart[2].shape == (2, 0)
    assert grad_scores.dtype == apart[2].dtype == logsumexp.dtype
    torch.testing.assert_close(
        operators.prototype_loss_backward(grad, grad_scores, scores, codes),
        operators.prototype_loss_backward_scores(grad, scores, codes, logsumexp, 0.1),
    )
    # And through autograd, also where the operator was not asked to keep it.
    scores.requires_grad_()
    kept, not_kept = (
        torch.autograd.grad(operators.prototype_loss(scores, codes, 0.1, known)[0], scores, grad)
        for known in (True, False)
    )
    torch.testing.assert_close(kept, not_kept)


def test_small_gradients_of_float16_survive_until_they_are_scaled() -> None:
    """As under a GradScaler: per element they are far below what float16 can hold."""
    g = torch.Generator().manual_seed(0)
    scores = (torch.rand(2048, 512, generator=g) * 2 - 1).half().requires_grad_()
    codes = torch.full((2048, 512), 1 / 512).half()
    ops.prototype_loss(scores, codes).backward(torch.tensor(65504.0).half())
    exact = scores.detach().double().requires_grad_()
    reference.prototype_loss(exact, codes.double()).backward(torch.tensor(65504.0).double())
    torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, torch.ones(2, 2)), TypeError, "scores should be a Tensor, got NoneType"),
        ((torch.ones(2, 2), [1]), TypeError, "codes should be a Tensor, got list"),
        ((torch.ones(2, 2), torch.ones(2, 2).half()), TypeError, "codes should be torch.float32 like scores, got torch.float16"),
        ((torch.ones(2, 2), torch.ones(2, 3)), ValueError, r"codes should be \[2, 2\] like scores, got \[2, 3\]"),
        ((torch.ones(2, 2), torch.ones(1, 2)), ValueError, r"codes should be \[2, 2\] like scores, got \[1, 2\]"),
        ((torch.ones(0, 2), torch.ones(0, 2)), ValueError, r"scores should be \[..., B, M\] with B, M >= 1, got \[0, 2\]"),
        ((torch.ones(2, 2), torch.ones(2, 2), 0), ValueError, "temperature should be positive and finite, got 0"),
        ((torch.ones(2, 2), torch.ones(2, 2), None), TypeError, "temperature should be a float, got NoneType"),
        ((torch.ones(2, 2), torch.ones(2, 2, device="meta")), ValueError, "codes should be on cpu, got meta"),
    ],
)  # fmt: skip
def test_errors(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.prototype_loss(*args)
