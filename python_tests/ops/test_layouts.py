"""However a tensor lies in memory, the result is that of its contiguous copy, and the tensor is
left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from copies import copies
from operator_samples import SAMPLES, Sample
from test_common import gradients
from torch import Tensor


def padded(x: Tensor) -> Tensor:
    """Every second element of each dimension of a larger tensor, from an odd offset."""
    if x.dim() == 0:
        return x
    big = x.new_zeros([2 * n + 3 for n in x.shape])
    view = big[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)]
    return view.copy_(x)


def reversed_dimensions(x: Tensor) -> Tensor:
    dims = tuple(reversed(range(x.dim())))
    return x.permute(dims).contiguous().permute(dims)


def offset(x: Tensor) -> Tensor:
    """Contiguous, but where only its own elements are aligned."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else padded(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": padded,
    "reversed_dimensions": reversed_dimensions,
    "offset": offset,
    "channels_last": channels_last,
}
plain = pytest.mark.parametrize(
    "sample",
    [s for s in SAMPLES if s.name in ("plain", "odd", "batched", "shifted", "float", "broadcast")],
    ids=str,
)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)


def run(sample: Sample, args: Any, kwargs: Any) -> list[Tensor]:
    """The result, and its gradients in all floating arguments that have one."""
    leaves = [
        x.detach().requires_grad_(sample.differentiable and i not in sample.constants)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for i, x in enumerate(args)
    ]
    out = sample.function(*leaves, **kwargs)
    if not sample.differentiable:
        return [out]
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    return [out.detach(), *gradients(sample.function, leaves, kwargs, weight)]


@plain
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(sample: Sample, dtype: torch.dtype, layout: str, device: str) -> None:
    args, kwargs = sample.arguments(dtype, device)
    expected = run(sample, [x.contiguous() if isinstance(x, Tensor) else x for x in args], kwargs)
    laid = [LAYOUTS[layout](x) if isinstance(x, Tensor) else x for x in args]
    before = [x.clone() if isinstance(x, Tensor) else x for x in laid]
    got = run(sample, laid, kwargs)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)
    for x, y in zip(laid, before, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x, y)


def some_columns(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 5)
    return wide[..., 2:-3].copy_(x)


def every_other_row(x: Tensor) -> Tensor:
    long = x.new_zeros(*x.shape[:-2], 2 * x.shape[-2], x.shape[-1])
    return long[..., 1::2, :].copy_(x)


def one_row_for_all(x: Tensor) -> Tensor:
    return x[..., :1, :].expand(x.shape) if x.dim() == 2 else some_columns(x)


matrices = pytest.mark.parametrize(
    "sample",
    [
        s
        for s in SAMPLES
        if s.operator not in ("random_shift", "frame_stack", "intrinsic_loss")  # torch's product
        and s.name in ("plain", "odd", "batched", "log_space")
    ],
    ids=str,
)
ROWS = pytest.mark.parametrize("layout", [some_columns, every_other_row, one_row_for_all])


@matrices
@dtypes
@ROWS
def test_contiguous_rows_are_not_copied(
    sample: Sample, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    """On a CPU, wherever the rows of a matrix lie."""
    args, kwargs = sample.arguments(dtype)
    laid = [layout(x) if isinstance(x, Tensor) else x for x in args]
    copied = [x.contiguous() if isinstance(x, Tensor) else x for x in laid]
    assert not any(x.is_contiguous() for x in laid if isinstance(x, Tensor))
    for g, e in zip(run(sample, laid, kwargs), run(sample, copied, kwargs), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)
    made = copies(sample.function, *laid, **kwargs)
    assert made == copies(sample.function, *copied, **kwargs)  # conversions to float32 and back
    assert made == [] or dtype != torch.float32


@ROWS
def test_gradients_copy_no_contiguous_rows(layout: Callable[[Tensor], Tensor]) -> None:
    """Of what their forward pass read: gradients themselves come contiguous."""
    scores, codes = layout(torch.rand(6, 8)), layout(torch.rand(6, 8).softmax(-1))
    logsumexp, one = torch.rand(6), torch.ones(())
    queries, keys = layout(torch.rand(5, 4)), layout(torch.rand(7, 4))
    distance, index = torch.ops.crpt.knn_distance(queries, keys, 2)
    ones = torch.ones(5)
    for function, args in (
        (torch.ops.crpt.prototype_loss_backward_scores, (one, scores, codes, logsumexp, 0.1)),
        (torch.ops.crpt.prototype_loss_backward_codes, (one, scores, logsumexp, 0.1)),
        (torch.ops.crpt.knn_distance_backward_queries, (ones, queries, keys, distance, index)),
        (torch.ops.crpt.knn_distance_backward_keys, (ones, queries, keys, distance, index)),
    ):
        assert copies(function, *args) == []
        copied = (x.contiguous() if isinstance(x, Tensor) else x for x in args)
        assert torch.equal(function(*args), function(*copied))


@plain
@dtypes
def test_expanded(sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Stride 0: one row, or one image, stands for all of them."""
    args, kwargs = sample.arguments(dtype, device)
    one = [x[:1].expand(x.shape) if isinstance(x, Tensor) else x for x in args]
    copied = [x.contiguous() if isinstance(x, Tensor) else x for x in one]
    for g, e in zip(run(sample, one, kwargs), run(sample, copied, kwargs), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)


@plain
def test_expanded_gradient(sample: Sample, device: str) -> None:
    """What sum() sends back has stride 0 everywhere."""
    if not sample.differentiable:
        return
    args, kwargs = sample.arguments(torch.float32, device, requires_grad=True)
    inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    out = sample.function(*args, **kwargs)
    got = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True)
    close = 0 if device == "cpu" else 1e-6  # another layout may mean another kernel of cuBLAS
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=close, atol=close)
    shuffled = torch.randn_like(out)
    strided = padded(shuffled)
    got = torch.autograd.grad(out, inputs, strided, retain_graph=True)
    for g, e in zip(got, torch.autograd.grad(out, inputs, shuffled), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)


@plain
def test_results_are_fresh(sample: Sample, device: str) -> None:
    args, kwargs = sample.arguments(torch.float32, device)
    out = sample.function(*args, **kwargs)
    storage = out.untyped_storage().data_ptr()
    for x in args:
        assert not isinstance(x, Tensor) or x.untyped_storage().data_ptr() != storage
    again = sample.function(*args, **kwargs)
    assert torch.equal(out, again)
    assert again.untyped_storage().data_ptr() != storage
