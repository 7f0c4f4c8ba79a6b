from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crpt import ops
from crpt.ops import reference

relaxed = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 40)
# On both sides of where exp gives way to log space.
temperatures = st.sampled_from([0.02, 0.049, 0.051, 0.1, 1.0])


def cosines(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


@relaxed
@given(seeds, sizes, sizes, temperatures, st.integers(0, 6))
def test_codes_are_distributions_and_match_the_twin(
    seed: int, b: int, m: int, temperature: float, iterations: int
) -> None:
    scores = cosines(seed, b, m)
    codes = ops.sinkhorn(scores, temperature, iterations)
    assert (codes >= 0).all()
    torch.testing.assert_close(codes.sum(-1), torch.ones(b, dtype=torch.float64))
    torch.testing.assert_close(codes, reference.sinkhorn(scores, temperature, iterations))


@relaxed
@given(seeds, sizes, sizes, temperatures)
def test_permuting_samples_and_prototypes_permutes_codes(
    seed: int, b: int, m: int, temperature: float
) -> None:
    scores = cosines(seed, b, m)
    rows, columns = torch.randperm(b), torch.randperm(m)
    permuted = ops.sinkhorn(scores[rows][:, columns], temperature)
    torch.testing.assert_close(permuted, ops.sinkhorn(scores, temperature)[rows][:, columns])


@relaxed
@given(seeds, sizes, sizes, st.floats(-1e3, 1e3))
def test_adding_a_constant_changes_nothing(seed: int, b: int, m: int, constant: float) -> None:
    scores = cosines(seed, b, m)
    torch.testing.assert_close(ops.sinkhorn(scores + constant), ops.sinkhorn(scores))


@relaxed
@given(seeds, sizes, sizes)
def test_scaling_scores_and_temperature_together_changes_nothing(seed: int, b: int, m: int) -> None:
    scores = cosines(seed, b, m)
    torch.testing.assert_close(ops.sinkhorn(scores * 7, 0.7), ops.sinkhorn(scores, 0.1))


@relaxed
@given(seeds, st.integers(2, 12))
def test_many_iterations_balance_the_prototypes(seed: int, size: int) -> None:
    codes = ops.sinkhorn(cosines(seed, 3 * size, size), 0.5, 300)
    torch.testing.assert_close(codes.sum(-2), torch.full((size,), 3.0, dtype=torch.float64))


def test_the_two_paths_meet() -> None:
    """Across the width at which the path changes, codes change as little as the scores do."""
    scores = cosines(0, 50, 30)
    scores = scores / (scores.max() - scores.min())
    below, above = (ops.sinkhorn(scores, 1 / (40 * f)) for f in (1 - 1e-9, 1 + 1e-9))
    torch.testing.assert_close(below, above, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "extreme", ["wide", "equal", "one_sample", "one_prototype", "massless", "minus_infinity"]
)
def test_extremes_stay_finite(dtype: torch.dtype, extreme: str, device: str) -> None:
    scores = cosines(0, 24, 16)
    if extreme == "wide":
        scores = scores * 1e4
    elif extreme == "equal":
        scores = torch.full_like(scores, 0.7)
    elif extreme == "one_sample":
        scores = scores[:1] * 1e4
    elif extreme == "one_prototype":
        scores = scores[:, :1] * 1e4
    elif extreme == "massless":
        scores[:, 3] = -6e4
    else:
        scores[:, 3] = scores[5] = -torch.inf
    scores = scores.to(device=device, dtype=dtype)
    codes = ops.sinkhorn(scores)
    assert codes.isfinite().all()
    assert (codes >= 0).all()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        codes.double().sum(-1),
        torch.ones(len(codes), dtype=torch.float64, device=device),
        atol=8 * eps,
        rtol=0,
    )
    torch.testing.assert_close(
        codes.float(), reference.sinkhorn(scores).float(), atol=2e-3, rtol=2e-2
    )


@pytest.mark.parametrize("shape", [(65_536, 16), (64, 8192)])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_many_samples_and_many_prototypes(
    shape: tuple[int, int], temperature: float, device: str
) -> None:
    scores = cosines(0, *shape).float().to(device)
    exact = reference.sinkhorn(scores.double(), temperature)
    error = (ops.sinkhorn(scores, temperature) - exact).abs().max()
    twins_error = (reference.sinkhorn(scores, temperature) - exact).abs().max()
    assert error <= 2 * twins_error


def test_equal_scores_give_uniform_codes(device: str) -> None:
    codes = ops.sinkhorn(torch.full((6, 8), 3.0, device=device))
    torch.testing.assert_close(codes, torch.full_like(codes, 1 / 8))


def test_nan_and_infinity_stay_within_their_problem(device: str) -> None:
    scores = cosines(0, 3, 5, 6).float().to(device)
    scores[1, 2, 3] = torch.nan
    scores[2, 0, 0] = torch.inf
    codes = ops.sinkhorn(scores)
    assert codes[0].isfinite().all()
    assert codes[1].isnan().all()
    assert codes[2].isnan().all()


def test_codes_carry_no_gradient(device: str) -> None:
    scores = cosines(0, 4, 4).to(device).requires_grad_()
    assert not ops.sinkhorn(scores).requires_grad
    # With gradients around it, it is a constant.
    (scores * ops.sinkhorn(scores)).sum().backward()
    assert torch.equal(scores.grad, ops.sinkhorn(scores))


def test_inputs_are_left_alone(device: str) -> None:
    scores = cosines(0, 20, 20).to(device)
    before = scores.clone()
    ops.sinkhorn(scores)
    ops.sinkhorn(scores, 0.001)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([[1.0]],), TypeError, "scores should be a Tensor, got list"),
        ((torch.ones(2, 2, dtype=torch.int64),), TypeError, "scores should be float32, float16, bfloat16, float64, got torch.int64"),
        ((torch.ones(2, 2, dtype=torch.complex64),), TypeError, "got torch.complex64"),
        ((torch.ones(0, 512),), ValueError, r"scores should be \[..., B, M\] with B, M >= 1, got \[0, 512\]"),
        ((torch.ones(512, 0),), ValueError, r"got \[512, 0\]"),
        ((torch.ones(5),), ValueError, r"got \[5\]"),
        ((torch.ones(2, 2), 0.0), ValueError, "temperature should be positive and finite, got 0.0"),
        ((torch.ones(2, 2), -0.1), ValueError, "temperature should be positive and finite, got -0.1"),
        ((torch.ones(2, 2), float("nan")), ValueError, "temperature should be positive and finite, got nan"),
        ((torch.ones(2, 2), float("inf")), ValueError, "temperature should be positive and finite, got inf"),
        ((torch.ones(2, 2), 10**400), ValueError, "temperature should be finite, got one beyond a float's range"),
        ((torch.ones(2, 2), "hot"), TypeError, "temperature should be a float, got str"),
        ((torch.ones(2, 2), torch.tensor(0.1)), TypeError, "temperature should be a float, got Tensor"),
        ((torch.ones(2, 2), 0.1, -1), ValueError, "iterations should be >= 0, got -1"),
        ((torch.ones(2, 2), 0.1, 100_001), ValueError, "iterations should be <= 100000, got 100001"),
        ((torch.ones(2, 2), 0.1, 3.0), TypeError, "iterations should be an int, got float"),
        ((torch.ones(2, 2), 0.1, True), TypeError, "iterations should be an int, got bool"),
        ((torch.ones(2, 2), 0.1, 2**63), ValueError, "iterations should fit in 64 bits"),
        ((torch.ones(2, 2).to_sparse(),), ValueError, "scores should be dense"),
    ],
)  # fmt: skip
def test_errors(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.sinkhorn(*args)


def test_meta_tensors_have_shapes_and_errors() -> None:
    codes = ops.sinkhorn(torch.empty(3, 4, 5, device="meta"))
    assert codes.shape == (3, 4, 5)
    with pytest.raises(ValueError, match="with B, M >= 1"):
        ops.sinkhorn(torch.empty(0, 5, device="meta"))
