from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_samples import FLOATS
from test_common import assert_within_budget

from crpt import ops
from crpt.ops import reference

B, M, D = 24, 40, 16


def inputs(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    e = torch.randn(B, D, dtype=torch.float64, device=device)
    c = F.normalize(torch.randn(M, D, dtype=torch.float64, device=device), dim=-1)
    q = torch.rand(B, M, dtype=torch.float64, device=device).softmax(-1)
    return e.to(dtype).requires_grad_(), c.to(dtype).requires_grad_(), q.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_parts_are_those_of_the_twin_and_carry_no_gradient(
    dtype: torch.dtype, device: str
) -> None:
    args = inputs(dtype, device)
    loss, *parts = ops.prototype_objective(*args, 0.2, 0.5, 2.0)
    _, *expected = reference.prototype_objective(*args, 0.2, 0.5, 2.0)
    for part, twin in zip(parts, expected, strict=True):
        assert part.dtype == dtype
        assert not part.requires_grad
        torch.testing.assert_close(part, twin)
    tolerance = 8 * torch.finfo(dtype).eps  # each of the three is rounded
    torch.testing.assert_close(loss, parts[0] + 0.5 * parts[1], rtol=tolerance, atol=tolerance)


def test_it_is_the_two_losses_and_their_gradients_in_one(device: str) -> None:
    e, c, q = inputs(device=device)
    loss, _, _ = ops.prototype_objective(e, c, q, 0.1, 0.7)
    apart = ops.prototype_loss(F.normalize(e, dim=-1) @ c.mT, q) + 0.7 * ops.intrinsic_loss(c)
    torch.testing.assert_close(loss, apart)
    pairs = (torch.autograd.grad(x, (e, c), torch.tensor(3.0).to(x)) for x in (loss, apart))
    for got, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(got, expected)


def test_gradients_are_those_of_finite_differences_without_the_one_sided_part(
    device: str,
) -> None:
    e, c, q = inputs(device=device)
    assert torch.autograd.gradcheck(
        lambda e, c: ops.prototype_objective(e, c, q, 0.1, 0.0)[0], (e, c), fast_mode=True
    )


def test_gradients_can_be_taken_again_and_are_not_shared(device: str) -> None:
    e, c, q = inputs(device=device)
    loss, _, _ = ops.prototype_objective(e, c, q)
    first = torch.autograd.grad(loss, (e, c), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for again, expected in zip(torch.autograd.grad(loss, (e, c)), kept, strict=True):
        assert torch.equal(again, expected)


def test_gradients_are_contiguous_whatever_the_strides_of_what_is_kept(device: str) -> None:
    e, c, _ = (x.detach() for x in inputs(torch.float32, device))
    kept = torch.randn(D, B, device=device).mT, torch.randn(D, M, device=device).mT
    grad = torch.tensor(2.0, device=device)
    got = torch.ops.crpt.prototype_objective_backward(grad, *kept, e, c)
    for result, gradient in zip(got, kept, strict=True):
        assert result.is_contiguous()  # as the fake says
        torch.testing.assert_close(result, 2 * gradient)


def test_no_gradient_is_computed_where_none_is_needed(device: str) -> None:
    e, c, q = (x.detach() for x in inputs(device=device))
    arguments = (e, c, q, 0.1, 0.005, 1.5)
    none = torch.ops.crpt.prototype_objective(*arguments, False, False)
    assert [x.shape for x in none[3:]] == [(0,), (0,)]
    only_c = torch.ops.crpt.prototype_objective(*arguments, False, True)
    assert [x.shape for x in only_c[3:]] == [(0,), (M, D)]
    e.requires_grad_()
    with pytest.raises(RuntimeError, match="called without a gradient that is needed"):
        torch.ops.crpt.prototype_objective(*arguments, False, True)[0].backward()
    with torch.no_grad():
        assert not ops.prototype_objective(e, c, q)[0].requires_grad


def test_without_weight_the_intrinsic_loss_is_reported_and_has_no_part(device: str) -> None:
    e, _, q = (x.detach()[:, :3] for x in inputs(torch.float32, device))
    c = torch.eye(3, device=device)
    c[1] = -c[0]  # s + offset = 0
    for function in (ops.prototype_objective, reference.prototype_objective):
        c.requires_grad_()
        loss, comparison, intrinsic = function(e, c, q, 0.1, 0.0, 1.0)
        assert intrinsic == -torch.inf
        assert loss == comparison
        (grad,) = torch.autograd.grad(loss, c)
        assert grad.isfinite().all()
        assert grad.any()


def test_zero_rows_and_nan(device: str) -> None:
    e, c, q = (x.detach() for x in inputs(torch.float32, device))
    e[3] = 0
    e.requires_grad_()
    loss, _, _ = ops.prototype_objective(e, c, q)
    loss.backward()
    assert loss.isfinite()
    assert e.grad.isfinite().all()
    with torch.no_grad():
        e[3, 0] = torch.nan
    assert ops.prototype_objective(e, c, q)[0].isnan()


@pytest.mark.parametrize("size", [512, 129])
def test_at_the_size_of_training(size: int) -> None:
    """Where the products are large enough to take another way than torch.matmul."""
    e, c = torch.randn(size, 128).requires_grad_(), F.normalize(torch.randn(512, 128), dim=-1)
    q = torch.rand(size, 512).softmax(-1)
    c.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (e, c)]
    loss, expected, twin = (
        ops.prototype_objective(e, c, q)[0],
        reference.prototype_objective(*exact, q.double())[0],
        reference.prototype_objective(e, c, q)[0],
    )
    assert_within_budget(loss, twin, expected)
    truth = torch.autograd.grad(expected, exact)
    got, twins = (torch.autograd.grad(x, (e, c)) for x in (loss, twin))
    for g, t, x in zip(got, twins, truth, strict=True):
        assert_within_budget(g, t, x)


def bad(**changes: Any) -> dict[str, Any]:
    return {"embeddings": torch.ones(2, 3), "prototypes": torch.ones(5, 3), "codes": torch.ones(2, 5), **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(embeddings=None), TypeError, "embeddings should be a Tensor, got NoneType"),
        (bad(codes=1.0), TypeError, "codes should be a Tensor, got float"),
        (bad(prototypes=torch.ones(5, 3).half()), TypeError, "prototypes should be torch.float32 like embeddings, got torch.float16"),
        (bad(codes=torch.ones(2, 5).double()), TypeError, "codes should be torch.float32 like embeddings, got torch.float64"),
        (bad(embeddings=torch.ones(0, 3)), ValueError, r"embeddings should be \[..., B, D\] with B, D >= 1, got \[0, 3\]"),
        (bad(prototypes=torch.ones(5, 4)), ValueError, r"prototypes should be \[M, 3\] with M >= 1, got \[5, 4\]"),
        (bad(prototypes=torch.ones(2, 5, 3)), ValueError, r"prototypes should be \[M, 3\] with M >= 1, got \[2, 5, 3\]"),
        (bad(codes=torch.ones(5, 2)), ValueError, r"codes should be \[2, 5\], got \[5, 2\]"),
        (bad(temperature=0.0), ValueError, "temperature should be positive and finite, got 0.0"),
        (bad(intrinsic_weight=-1), ValueError, "intrinsic_weight should be >= 0 and finite, got -1.0"),
        (bad(intrinsic_weight=float("nan")), ValueError, "intrinsic_weight should be >= 0 and finite, got nan"),
        (bad(offset="1"), TypeError, "offset should be a float, got str"),
        (bad(codes=torch.ones(2, 5, device="meta")), ValueError, "codes should be on cpu, got meta"),
    ],
)  # fmt: skip
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.prototype_objective(**arguments)
