"""The operators inside the transforms of torch.func, and in inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operator_samples import SAMPLES, Sample
from test_common import differentiable, samples
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vjp, vmap

from crpt import ops

SIZE = 3


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    """torch would run an operator without a rule of its own sample by sample, and warn."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def stacked(x: Tensor, dim: int) -> Tensor:
    """SIZE different tensors that are as valid as x, side by side in `dim`."""
    order = x.flatten()
    others = [order.roll(3 * i).reshape(x.shape) for i in range(SIZE)]
    return torch.stack(others, dim) if dim >= 0 else torch.stack(others, dim=-1)


def tensors(args: tuple[Any, ...]) -> list[int]:
    return [i for i, x in enumerate(args) if isinstance(x, Tensor)]


def one_by_one(function: Callable[..., Tensor], dims: list[int | None], args: list[Any]) -> Tensor:
    return torch.stack(
        [
            function(*(x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True)))
            for i in range(SIZE)
        ]
    )


@samples
def test_vmap_over_any_of_the_arguments(sample: Sample, device: str) -> None:
    args, kwargs = sample.arguments(torch.float64, device)
    every = tensors(args)
    for chosen in (every, *([i] for i in every)):
        for dim in (0, 1, -1):
            batched, dims = list(args), [None] * len(args)
            for i in chosen:
                batched[i], dims[i] = stacked(args[i], dim), dim
            got = vmap(lambda *a: sample.function(*a, **kwargs), tuple(dims))(*batched)
            expected = one_by_one(lambda *a: sample.function(*a, **kwargs), dims, batched)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@samples
def test_vmap_over_no_samples(sample: Sample, device: str) -> None:
    """Shapes and dtypes as of any other number, and gradients as empty."""
    args, kwargs = sample.arguments(torch.float64, device, requires_grad=sample.differentiable)
    one = sample.function(*args, **kwargs)
    every = tensors(args)
    for chosen in (every, *([i] for i in every)):
        for dim in (0, -1):
            batched, dims = list(args), [None] * len(args)
            for i in chosen:
                none = stacked(args[i].detach(), dim).narrow(dim, 0, 0)
                batched[i], dims[i] = none.requires_grad_(args[i].requires_grad), dim
            got = vmap(lambda *a: sample.function(*a, **kwargs), tuple(dims))(*batched)
            assert got.shape == (0, *one.shape)
            assert (got.dtype, got.device) == (one.dtype, one.device)
            floating = [x for x in batched if isinstance(x, Tensor) and x.requires_grad]
            if got.requires_grad:
                grads = torch.autograd.grad(got.sum(), floating, allow_unused=True)
                assert all(g is None or not g.any() for g in grads)


@samples
def test_vmap_in_vmap(sample: Sample, device: str) -> None:
    args, kwargs = sample.arguments(torch.float64, device)
    (i, *_) = every = tensors(args)
    batched = [stacked(x, 0) if j in every else x for j, x in enumerate(args)]
    dims = [0 if j in every else None for j in range(len(args))]
    # The outer samples differ in the first tensor only, the inner ones in all.
    outer = [stacked(x, 1) if j == i else x for j, x in enumerate(batched)]
    inner = vmap(lambda *a: sample.function(*a, **kwargs), tuple(dims))
    got = vmap(inner, tuple(1 if j == i else None for j in range(len(args))))(*outer)
    for n in range(SIZE):
        each = [x.select(1, n) if j == i else x for j, x in enumerate(outer)]
        expected = one_by_one(lambda *a: sample.function(*a, **kwargs), dims, each)
        torch.testing.assert_close(got[n], expected, rtol=1e-12, atol=1e-12)


def inputs_of(sample: Sample, device: str) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator as a function of its floating inputs alone, these, and a cotangent."""
    args, kwargs = sample.arguments(torch.float64, device)
    floating = [
        i for i in tensors(args) if args[i].is_floating_point() and i not in sample.constants
    ]

    def function(*inputs: Tensor) -> Tensor:
        whole = list(args)
        for i, x in zip(floating, inputs, strict=True):
            whole[i] = x
        return sample.function(*whole, **kwargs)

    inputs = [args[i] for i in floating]
    return function, inputs, torch.randn_like(function(*inputs))


def backward(function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*inputs), inputs, weight))


def close(got: Any, expected: Any) -> None:
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@differentiable
def test_reverse_mode_transforms(sample: Sample, device: str) -> None:
    function, inputs, weight = inputs_of(sample, device)
    expected = backward(function, inputs, weight)
    every = tuple(range(len(inputs)))
    out, pull = vjp(function, *inputs)
    assert torch.equal(out, function(*inputs))
    close(pull(weight), expected)
    close(grad(lambda *x: (function(*x) * weight).sum(), every)(*inputs), expected)
    for i in every:  # the others are constants
        close([grad(lambda *x: (function(*x) * weight).sum(), i)(*inputs)], expected[i : i + 1])


@differentiable
def test_vmap_and_gradients_in_either_order(sample: Sample, device: str) -> None:
    function, inputs, weight = inputs_of(sample, device)
    batched = [stacked(x, 0) for x in inputs]
    every = tuple(range(len(inputs)))
    expected = [backward(function, [x[n] for x in batched], weight) for n in range(SIZE)]
    expected = [torch.stack(x) for x in zip(*expected, strict=True)]
    each = vmap(grad(lambda *x: (function(*x) * weight).sum(), every))
    close(each(*batched), expected)
    together = grad(lambda *x: (vmap(function)(*x) * weight).sum(), every)
    close(together(*batched), expected)
    # torch.autograd outside, vmap inside.
    close(backward(vmap(function), batched, weight.expand(SIZE, *weight.shape)), expected)


# torch.func takes no Jacobians of empty outputs.
not_empty = pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.differentiable and not s.name.startswith("no_")], ids=str
)


@not_empty
def test_jacobians(sample: Sample, device: str) -> None:
    function, inputs, _ = inputs_of(sample, device)
    every = tuple(range(len(inputs)))
    jacobians = jacrev(function, every)(*inputs)
    expected = torch.autograd.functional.jacobian(function, tuple(inputs))
    close(jacobians, expected)
    in_one_go = torch.autograd.functional.jacobian(function, tuple(inputs), vectorize=True)
    close(in_one_go, expected)


@not_empty
def test_what_is_not_supported_says_so(sample: Sample, device: str) -> None:
    function, inputs, weight = inputs_of(sample, device)
    if sample.operator != "random_shift":  # which is linear
        gradient = grad(lambda *x: (function(*x) * weight).sum())
        with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
            jacrev(gradient)(*inputs)
    for forward in (jacfwd(function), hessian(lambda *x: function(*x).sum())):
        with pytest.raises(NotImplementedError, match="forward"):
            forward(*inputs)


def test_vmap_draws_as_torch_does(device: str) -> None:
    images = torch.arange(2 * 4 * 9 * 9, device=device).reshape(2, 4, 1, 9, 9)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(ops.random_shift)(images)
    same = vmap(lambda x: ops.random_shift(x) - x, randomness="same")(images)
    assert torch.equal(same[0], same[1])  # the second images are the first plus a constant
    different = vmap(lambda x: ops.random_shift(x) - x, randomness="different")(images)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_still_refuses_what_is_outside(dims: tuple[int | None, int | None]) -> None:
    frames = torch.zeros(4, 3, 5, 5, dtype=torch.uint8)
    index = torch.tensor([[0, 3], [1, 4]])
    batched = [
        x if d is None else x.expand(2, *x.shape)
        for x, d in zip((frames, index), dims, strict=True)
    ]
    with pytest.raises(ValueError, match=r"index should be in \[0, 3\], got 4"):
        vmap(ops.frame_stack, dims)(*batched)


def test_vmap_says_which_rows_an_error_counts() -> None:
    frames, index = torch.zeros(4, 3, 5, 5, dtype=torch.uint8), torch.zeros(2, 3, 1).long()
    index[1, 2] = 4
    text = r"got 4 at \[5, 0\] \(of the rows of all 2 samples of vmap, 3 each\)"
    with pytest.raises(ValueError, match=text):
        vmap(ops.frame_stack, (None, 0))(frames, index)


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.differentiable and s.name == "plain"], ids=str
)
def test_vmap_compiles_and_gradients_of_torch_func_do_not(sample: Sample) -> None:
    function, inputs, weight = inputs_of(sample, "cpu")
    torch._dynamo.reset()
    batched = [stacked(x, 0) for x in inputs]
    compiled = torch.compile(vmap(function), fullgraph=True, backend="aot_eager")
    close([compiled(*batched)], [vmap(function)(*batched)])
    gradient = grad(lambda *x: (function(*x) * weight).sum())
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.compile(gradient, fullgraph=True, backend="aot_eager")(*inputs)


@samples
def test_inference_mode(sample: Sample, device: str) -> None:
    args, kwargs = sample.arguments(torch.float32, device, requires_grad=sample.differentiable)
    expected = sample.function(*args, **kwargs)
    with torch.inference_mode():
        got = sample.function(*args, **kwargs)
        born_there, _ = sample.arguments(torch.float32, device)
        again = sample.function(*born_there, **kwargs)
    for out in (got, again):
        assert out.is_inference()
        assert not out.requires_grad
        assert torch.equal(out, expected.detach())
