"""The product inside the operators, by both of torch's BLAS."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from crpt import _cpu
from crpt.ops import gemm


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def _route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two, whatever this CPU would choose, and for small sizes too."""
    if request.param and not gemm._works():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(gemm, "ONEDNN", request.param)
    monkeypatch.setattr(gemm, "_WORTH_A_CALL", 1)
    monkeypatch.setattr(gemm, "_LONGEST_SUM", 30)


by_both = pytest.mark.usefixtures("_route")


def views(*shape: int) -> dict[str, Tensor]:
    """The same shape with every kind of strides."""
    *leading, rows, columns = shape
    return {
        "by rows": torch.randn(shape),
        "by columns": torch.randn(*leading, columns, rows).mT,
        "rows apart": torch.randn(*leading, rows, columns + 3)[..., :columns],
        "columns apart": torch.randn(*leading, columns, rows + 5).mT[..., :rows, :],
        "every second": torch.randn(*leading, 2 * rows, 2 * columns)[..., ::2, ::2],
        "one row, expanded": torch.randn(*leading, 1, columns).expand(shape),
        "one column, expanded": torch.randn(*leading, rows, 1).expand(shape),
        "one value, expanded": torch.randn(*leading, 1, 1).expand(shape),
        "not at the start": torch.randn(*leading, rows + 1, columns)[..., 1:, :],
    }


def check(a: Tensor, b: Tensor) -> None:
    before = a.clone(), b.clone()
    got, exact = gemm.matmul(a, b), a.double() @ b.double()
    assert got.shape == exact.shape
    assert got.dtype == torch.float32
    bound = 2 * a.shape[-1] * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs())
    assert ((got - exact).abs() <= bound + 1e-30).all()
    assert got.data_ptr() not in (a.data_ptr(), b.data_ptr())
    assert all(torch.equal(x, y) for x, y in zip(before, (a, b), strict=True))


@by_both
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 1, 1), (1, 5, 1), (5, 1, 3), (3, 7, 1), (1, 9, 4), (17, 33, 19), (64, 128, 48)],
)
def test_any_strides(m: int, k: int, n: int) -> None:
    for a in views(m, k).values():
        for b in views(k, n).values():
            check(a, b)


@by_both
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 7, 5), (3, 5, 4)),
        ((3, 7, 5), (5, 4)),
        ((7, 5), (3, 5, 4)),
        ((2, 1, 7, 5), (3, 5, 4)),
        ((2, 3, 7, 5), (2, 3, 5, 4)),
        ((1, 1, 7, 5), (5, 4)),
    ],
    ids=str,
)
def test_leading_dimensions_broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    for left in views(*a).values():
        for right in views(*b).values():
            check(left, right)


@by_both
@pytest.mark.parametrize("leading", [(), (3,)])
def test_the_product_of_a_large_transpose_is_turned(leading: tuple[int, ...]) -> None:
    """As of gradients with the rows they came from: wide, and few columns."""
    left = torch.randn(*leading, 40, 30).mT
    for right in views(*leading, 40, 3).values():
        check(left, right)
    assert gemm._turns(torch.randn(40, 30).mT, torch.randn(40, 3))
    assert not gemm._turns(torch.randn(40, 30).mT, torch.randn(40, 60))
    assert not gemm._turns(torch.randn(30, 40), torch.randn(40, 3))


@pytest.mark.skipif(not gemm.ONEDNN, reason="oneDNN is not the faster one on this CPU")
@pytest.mark.parametrize("turned", [False, True])
def test_the_error_of_long_sums_is_at_most_three_times_that_of_the_other(turned: bool) -> None:
    """Of terms of one sign it grows with the longest chain of additions."""
    a, b = torch.rand(256, 2048), torch.rand(2048, 64)
    if turned:
        a = a.mT.contiguous().mT
    exact = a.double() @ b.double()
    error, others = ((x - exact).square().mean().sqrt() for x in (gemm.matmul(a, b), a @ b))
    assert error <= 3 * others


def test_onednn_gets_matrices_without_gaps() -> None:
    """With gaps between rows its reference code would take them: right, and hundreds of times as
    slow."""
    for x in views(20, 30).values():
        got = gemm._strided(x)
        assert torch.equal(got, x)
        assert got.is_contiguous() or got.mT.is_contiguous()
    for x in (torch.randn(20, 30), torch.randn(30, 20).mT):
        assert gemm._strided(x) is x


@by_both
@pytest.mark.parametrize(
    ("a", "b"),
    [((0, 5), (5, 4)), ((3, 5), (5, 0)), ((3, 0), (0, 4)), ((0, 3, 5), (5, 4)), ((0, 3, 5), (0, 5, 4))],
    ids=str,
)  # fmt: skip
def test_nothing_to_multiply(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = torch.randn(a), torch.randn(b)
    assert torch.equal(gemm.matmul(x, y), x @ y)


@by_both
def test_repeats_are_equal_and_threads_change_only_the_order_of_sums() -> None:
    a, b = torch.randn(300, 257), torch.randn(257, 129)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gemm.matmul(a, b))
        assert torch.equal(gemm.matmul(a, b), results[-1])
        check(a, b)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@by_both
def test_infinities_and_nan_go_where_they_belong() -> None:
    a, b = torch.randn(20, 30), torch.randn(30, 40)
    a[3, 4], a[7, 0] = torch.nan, torch.inf
    got = gemm.matmul(a, b)
    assert got[3].isnan().all()
    assert got[7].isinf().all()
    others = [i for i in range(20) if i not in (3, 7)]
    assert got[others].isfinite().all()


@by_both
def test_autocast_does_not_reach_it() -> None:
    a, b = torch.randn(33, 65), torch.randn(65, 31)
    expected = gemm.matmul(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gemm.matmul(a, b), expected)


@by_both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_torch_matmuls(dtype: torch.dtype) -> None:
    a, b = torch.randn(33, 65).to(dtype), torch.randn(65, 31).to(dtype)
    assert torch.equal(gemm.matmul(a, b), a @ b)


@by_both
def test_users_may_switch_onednn_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("called although switched off")

    monkeypatch.setattr(gemm, "_onednn", refuse)
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(gemm.matmul(a, b), a @ b)


def test_a_torch_without_the_product_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (AttributeError, RuntimeError, TypeError):

        def missing(*_: object, error: type[Exception] = error) -> Tensor:
            raise error("no such operator")

        monkeypatch.setattr(gemm, "_linear", missing)
        assert not gemm._works()
    with monkeypatch.context() as patch:
        patch.setattr(gemm, "_linear", lambda a, w: a @ w.mT + 1)
        assert not gemm._works()
    monkeypatch.setattr(gemm, "_linear", lambda a, w: a @ w.mT)
    assert gemm._works() == torch.backends.mkldnn.is_available()


def test_the_choice_is_that_of_the_cpu() -> None:
    with open("/proc/cpuinfo") as file:
        cpu = file.read()
    hidden = "avx512vl" in cpu and "avx512dq" in cpu and "GenuineIntel" not in cpu
    assert _cpu.avx512_hidden_from_mkl is hidden
    chosen = subprocess.run(
        [sys.executable, "-c", "from crpt.ops import gemm; print(gemm.ONEDNN)"],
        env={**os.environ, "CRPT_ISA": "baseline"},  # of the kernels, not of torch
        capture_output=True,
        text=True,
        check=True,
    )
    expected = hidden and torch.backends.mkl.is_available() and gemm._works()
    assert chosen.stdout.strip() == str(expected)


@pytest.mark.parametrize(
    "default",
    ["torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')"],
)
def test_the_choice_does_not_depend_on_torch_defaults(default: str) -> None:
    code = f"import torch; {default}; from crpt.ops import gemm; print(gemm._works())"
    chosen = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert chosen.stdout.strip() == str(gemm._works())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 16), (17, 31), (5, 200), (301, 257)])
@pytest.mark.parametrize("threads", [1, 3])
def test_transposed_copies(rows: int, columns: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for x in (torch.randn(columns, rows).mT, torch.randn(columns, rows + 3).mT[:rows]):
        copy = gemm._by_rows(x)
        assert copy.is_contiguous()
        assert torch.equal(copy, x)
