from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crpt import ops
from crpt.ops import cpu, reference


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 8), st.integers(1, 150), st.integers(1, 20), st.data())
def test_distances_are_sorted_by_k_and_match_the_twin(
    seed: int, b: int, q: int, d: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, q))
    queries, keys = normal(seed, b, d), normal(seed + 1, q, d)
    distance = ops.knn_distance(queries, keys, k)
    if b > 0:
        torch.testing.assert_close(distance, reference.knn_distance(queries, keys, k))
    assert (distance >= 0).all()
    if k > 1:
        assert (distance >= ops.knn_distance(queries, keys, k - 1)).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 12), st.data())
def test_invariances(seed: int, q: int, d: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, q))
    queries, keys = normal(seed, 5, d), normal(seed + 1, q, d)
    distance = ops.knn_distance(queries, keys, k)
    offset, order = normal(seed + 2, d), torch.randperm(q)
    torch.testing.assert_close(ops.knn_distance(queries, keys[order], k), distance)
    torch.testing.assert_close(ops.knn_distance(queries + offset, keys + offset, k), distance)
    torch.testing.assert_close(ops.knn_distance(3 * queries, 3 * keys, k), 3 * distance)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e5])
def test_nearly_equal_vectors_do_not_suffer_cancellation(offset: float, device: str) -> None:
    """A matrix product in float32 says nothing about distances of 1e-2 at 1e5."""
    queries = (offset + 0.05 * normal(0, 20, 32)).float().to(device)
    keys = (offset + 0.05 * normal(1, 500, 32)).float().to(device)
    for k in (1, 3, 400):
        exact = reference.knn_distance(queries.double(), keys.double(), k)
        got = ops.knn_distance(queries, keys, k).double()
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)


def test_a_query_among_the_keys_is_its_own_nearest(device: str) -> None:
    keys = normal(0, 100, 64).float().to(device).requires_grad_()
    queries = keys.detach().clone().requires_grad_()
    distance = ops.knn_distance(queries, keys, 1)
    assert torch.equal(distance, torch.zeros_like(distance))
    distance.sum().backward()
    # At distance 0 there is no direction.
    assert torch.equal(queries.grad, torch.zeros_like(queries))
    assert torch.equal(keys.grad, torch.zeros_like(keys))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_whatever_the_precision_of_the_matrix_product(precision: str, device: str) -> None:
    queries, keys = normal(0, 50, 128).float().to(device), normal(1, 600, 128).float().to(device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = ops.knn_distance(queries, keys, 3)
        low = cpu._dot_tolerance(torch.float32, 128) > torch.finfo(torch.bfloat16).eps
    finally:
        torch.set_float32_matmul_precision(before)
    assert low is (precision != "highest")
    exact = reference.knn_distance(queries.double(), keys.double(), 3)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_the_newer_setting_of_the_precision() -> None:
    """In a process of its own: once it is used, torch refuses to answer for the older one."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has only set_float32_matmul_precision")
    program = """
import torch
from crpt import ops
from crpt.ops import cpu, reference

def check(rounds):
    torch.testing.assert_close(ops.knn_distance(queries, keys, 3).double(), exact, rtol=1e-6, atol=0)
    bfloat16 = torch.finfo(torch.bfloat16).eps
    assert (cpu._dot_tolerance(torch.float32, 128) > bfloat16) is rounds
    assert cpu._dot_tolerance(torch.float64, 128) < bfloat16

queries, keys = torch.randn(50, 128), torch.randn(600, 128)
exact = reference.knn_distance(queries.double(), keys.double(), 3)
check(False)
torch.backends.fp32_precision = "tf32"
check(True)
torch.backends.mkldnn.matmul.fp32_precision = "ieee"
check(False)
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
check(True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_many_queries_go_block_by_block(device: str) -> None:
    queries, keys = normal(0, 1500, 3).float().to(device), normal(1, 2048, 3).float().to(device)
    whole = ops.knn_distance(queries, keys, 2)
    for i in (0, 511, 512, 1023, 1499):
        assert torch.equal(ops.knn_distance(queries[i : i + 1], keys, 2), whole[i : i + 1])


def test_the_gradient_of_a_key_adds_up_over_its_queries(device: str) -> None:
    keys = torch.tensor([[0.0, 0.0], [50.0, 50.0]], device=device, requires_grad=True)
    queries = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], device=device)
    ops.knn_distance(queries, keys, 1).sum().backward()
    expected = torch.tensor([[-1.6, -1.8], [0.0, 0.0]], device=device)
    torch.testing.assert_close(keys.grad, expected)


def test_nan_and_infinity_are_farther_than_everything(device: str) -> None:
    keys = torch.tensor([[torch.nan], [1.0], [torch.inf], [2.0]], device=device)
    query = torch.zeros(1, 1, device=device)
    assert [ops.knn_distance(query, keys, k).item() for k in (1, 2, 3)] == [1.0, 2.0, torch.inf]
    assert ops.knn_distance(query, keys, 4).isnan()
    assert ops.knn_distance(query * torch.nan, keys, 1).isnan()


def test_values_whose_squares_overflow(device: str) -> None:
    keys = torch.tensor([[1e25], [0.5]], device=device)
    assert ops.knn_distance(torch.zeros(1, 1, device=device), keys, 1).item() == 0.5
    assert ops.knn_distance(torch.zeros(1, 1, device=device), keys, 2).item() == torch.inf


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("q", torch.ones(2, 3), 1), TypeError, "queries should be a Tensor, got str"),
        ((torch.ones(2, 3), None, 1), TypeError, "keys should be a Tensor, got NoneType"),
        ((torch.ones(2, 3).long(), torch.ones(2, 3), 1), TypeError, "queries should be float32, float16, bfloat16, float64, got torch.int64"),
        ((torch.ones(2, 3), torch.ones(2, 3).half(), 1), TypeError, "keys should be torch.float32 like queries, got torch.float16"),
        ((torch.ones(3), torch.ones(2, 3), 1), ValueError, r"queries should be \[B, D\] with D >= 1, got \[3\]"),
        ((torch.ones(2, 3), torch.ones(4, 2), 1), ValueError, r"keys should be \[Q, 3\] with Q >= 1, got \[4, 2\]"),
        ((torch.ones(2, 3), torch.ones(0, 3), 1), ValueError, r"keys should be \[Q, 3\] with Q >= 1, got \[0, 3\]"),
        ((torch.ones(2, 3), torch.ones(4, 3), 0), ValueError, r"k should be in \[1, 4\], the number of keys, got 0"),
        ((torch.ones(2, 3), torch.ones(4, 3), 5), ValueError, r"k should be in \[1, 4\], the number of keys, got 5"),
        ((torch.ones(2, 3), torch.ones(4, 3), 1.0), TypeError, "k should be an int, got float"),
        ((torch.ones(2, 3), torch.ones(4, 3), 2**64), ValueError, "k should fit in 64 bits, got an int of 65 bits"),
    ],
)  # fmt: skip
def test_errors(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.knn_distance(*args)
