"""One list of samples; values, gradients, registration and compilation of every operator."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from operator_samples import FLOATS, LARGE, SAMPLES, Sample
from torch import Tensor

from crpt.ops.conditions import compute_dtype

samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)
differentiable = pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.differentiable], ids=str
)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
ONE_SIDED = ("intrinsic_loss", "prototype_objective")
WITH_GEMM = ("prototype_similarity", *ONE_SIDED)  # which is torch's
MOVES_ONLY = ("random_shift", "frame_stack")


def assert_within_budget(
    got: Tensor, twin: Tensor, exact: Tensor, terms: float = 0.0, times: int = 2
) -> None:
    """No further from the exact value than twice the twin in the same precision: in the root of the
    mean square, and at most.

    Beside what luck decides: both compute in float32, whatever the dtype of the result, and either
    may happen to be exact. So two ulps of float32 are allowed, and less in the mean of many. In
    float64 the twin is itself the exact value, and what is allowed is for both. Where terms cancel,
    `terms` is their size.
    """
    assert got.shape == exact.shape
    assert got.dtype == twin.dtype
    if exact.numel() == 0:
        return
    float64 = got.dtype == torch.float64
    ulp = torch.finfo(compute_dtype(got.dtype)).eps
    most, mean = (16 * ulp, 16 * ulp) if float64 else (2 * ulp, 2 * ulp / exact.numel() ** 0.5)
    got, twin, exact = (x.detach().double().cpu() for x in (got, twin, exact))
    if exact.abs().max() < 1e-9:  # terms of about 1 that cancelled
        terms = 4.0
    for measure, luck in ((largest, most), (root_mean_square, mean)):
        error, twins_error = measure(got - exact), measure(twin - exact)
        assert error <= times * twins_error + luck * max(measure(exact), terms), (
            f"error {error:.3g}, the twin's {twins_error:.3g}"
        )


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def gradients(function: Any, args: Any, kwargs: Any, weight: Tensor) -> list[Tensor]:
    inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    out = function(*args, **kwargs)
    return list(torch.autograd.grad(out, inputs, weight.to(out)))


@samples
@dtypes
def test_values_match_the_twin(sample: Sample, dtype: torch.dtype, device: str) -> None:
    args, kwargs = sample.arguments(dtype, device)
    got, twin = sample.function(*args, **kwargs), sample.twin(*args, **kwargs)
    if sample.operator in MOVES_ONLY:
        assert got.dtype == twin.dtype
        assert torch.equal(got, twin)
        return
    exact_args = [x.double() if isinstance(x, Tensor) else x for x in args]
    assert_within_budget(got, twin, sample.twin(*exact_args, **kwargs))


@differentiable
@dtypes
def test_gradients_match_the_twin(sample: Sample, dtype: torch.dtype, device: str) -> None:
    args, kwargs = sample.arguments(dtype, device, requires_grad=True)
    exact_args = [
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in args
    ]
    weight = torch.randn_like(sample.twin(*exact_args, **kwargs)).to(dtype)
    got = gradients(sample.function, args, kwargs, weight)
    twin = gradients(sample.twin, args, kwargs, weight)
    exact = gradients(sample.twin, exact_args, kwargs, weight)
    for g, t, e in zip(got, twin, exact, strict=True):
        assert_within_budget(g, t, e)


@pytest.mark.parametrize(
    "sample",
    # The one-sided gradient of intrinsic_loss is by definition not that of its value.
    [s for s in SAMPLES if s.differentiable and s.operator not in ONE_SIDED],
    ids=str,
)
def test_gradients_match_finite_differences(sample: Sample, device: str) -> None:
    args, kwargs = sample.arguments(torch.float64, device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: sample.function(*a, **kwargs), args, fast_mode=True)


@differentiable
def test_only_the_gradient_that_is_needed(sample: Sample, device: str) -> None:
    args, kwargs = sample.arguments(torch.float64, device, requires_grad=True)
    inputs = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
    out = sample.function(*args, **kwargs)
    both = torch.autograd.grad(out.sum(), [args[i] for i in inputs])
    for i, expected in zip(inputs, both, strict=True):
        alone = [x.detach() if isinstance(x, Tensor) else x for x in args]
        alone[i].requires_grad_()
        (got,) = torch.autograd.grad(sample.function(*alone, **kwargs).sum(), [alone[i]])
        assert torch.equal(got, expected)


def dispatcher_calls(sample: Sample, device: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls of torch.ops.crpt.* that the public function makes, gradient included."""
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "crpt":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    args, kwargs = sample.arguments(torch.float32, device, requires_grad=sample.differentiable)
    with Record():
        out = sample.function(*args, **kwargs)
        if sample.differentiable:
            out.sum().backward()
    return calls


@samples
def test_opcheck(sample: Sample, device: str) -> None:
    check_calls(sample, device, ("test_schema", "test_autograd_registration", "test_faketensor"))


FIRST = {sample.operator: sample for sample in reversed(SAMPLES)}.values()


# What the others make of AOT autograd, test_compiles_as_one_graph shows in seconds.
@pytest.mark.parametrize(
    "sample",
    [s if s in FIRST else pytest.param(s, marks=pytest.mark.slow) for s in SAMPLES],
    ids=str,
)
def test_opcheck_of_aot_autograd(sample: Sample, device: str) -> None:
    check_calls(sample, device, ("test_aot_dispatch_dynamic",))


def check_calls(sample: Sample, device: str, tests: tuple[str, ...]) -> None:
    calls = dispatcher_calls(sample, device)
    assert calls
    for function, recorded in calls:
        again = sample.differentiable and "backward" not in function.__name__
        fresh = [
            x.detach().requires_grad_(again)
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for x in recorded
        ]
        torch.library.opcheck(function, tuple(fresh), test_utils=tests)


@samples
def test_compiles_as_one_graph_with_dynamic_shapes(sample: Sample, device: str) -> None:
    check_compiled(sample, device, "aot_eager")


@pytest.mark.slow
@samples
def test_compiles_with_inductor(sample: Sample, device: str) -> None:
    check_compiled(sample, device, "inductor")


def check_compiled(sample: Sample, device: str, backend: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(sample.function, fullgraph=True, dynamic=True, backend=backend)
    args, kwargs = sample.arguments(torch.float32, device, requires_grad=sample.differentiable)
    got, expected = function(*args, **kwargs), sample.function(*args, **kwargs)
    assert torch.equal(got, expected)
    assert got.stride() == expected.stride()
    if sample.differentiable:
        weight = torch.randn_like(expected)
        pairs = zip(
            gradients(function, args, kwargs, weight),
            gradients(sample.function, args, kwargs, weight),
            strict=True,
        )
        for g, e in pairs:
            if hasattr(torch.Tag, "needs_exact_strides"):
                assert torch.equal(g, e)
            else:  # an older inductor keeps the strides' order only, and torch's products round so
                torch.testing.assert_close(g, e)


@pytest.fixture
def _nan_in_fresh_memory() -> Iterator[None]:
    """What a thread leaves out must not be found there from an earlier call."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("sample", LARGE, ids=str)
@pytest.mark.usefixtures("_nan_in_fresh_memory")
def test_results_do_not_depend_on_the_number_of_threads(sample: Sample) -> None:
    args, kwargs = sample.arguments(torch.float32, requires_grad=sample.differentiable)
    weight = torch.randn_like(sample.twin(*args, **kwargs), dtype=torch.float32)

    def results(function: Any, args: Any) -> list[Tensor]:
        out = function(*args, **kwargs).detach()
        return [out, *(gradients(function, args, kwargs, weight) if sample.differentiable else [])]

    one, two, three = [], [], []
    for threads, into in ((1, one), (2, two), (3, three)):
        torch.set_num_threads(threads)
        into += results(sample.function, args)
    torch.set_num_threads(1)
    exact_args = sample.arguments(torch.float64, requires_grad=sample.differentiable)[0]
    exact, twin = results(sample.twin, exact_args), results(sample.twin, args)
    for a, b, c, t, e in zip(one, two, three, twin, exact, strict=True):
        if c.is_floating_point():
            assert_within_budget(c, t, e)
        else:
            assert torch.equal(c, t)
        if sample.operator in WITH_GEMM:
            torch.testing.assert_close(b, a)
            torch.testing.assert_close(c, a)
        else:
            assert torch.equal(b, a)
            assert torch.equal(c, a)


def test_calls_from_several_python_threads() -> None:
    def work(sample: Sample, results: list[Tensor]) -> None:
        args, kwargs = sample.arguments(torch.float32)
        results.extend(sample.function(*args, **kwargs) for _ in range(20))

    results: list[list[Tensor]] = [[] for _ in SAMPLES]
    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(SAMPLES, results, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sample, outs in zip(SAMPLES, results, strict=True):
        args, kwargs = sample.arguments(torch.float32)
        expected = sample.function(*args, **kwargs)
        assert len(outs) == 20
        assert all(torch.equal(out, expected) for out in outs)


@differentiable
def test_second_derivatives_refuse_or_are_right(sample: Sample, device: str) -> None:
    args, kwargs = sample.arguments(torch.float64, device, requires_grad=True)
    inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    out = sample.function(*args, **kwargs)
    weight = torch.randn_like(out).requires_grad_()
    grads = torch.autograd.grad(out, inputs, weight, create_graph=True)
    if sample.operator == "random_shift":
        (again,) = torch.autograd.grad(grads[0], weight, torch.ones_like(grads[0]))
        ones = torch.ones_like(inputs[0])
        assert torch.equal(again, sample.function(ones, *args[1:], **kwargs))
        return
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(sum(g.sum() for g in grads), inputs[0])


LEVELS = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw"}}


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_level(level: str) -> None:
    with open("/proc/cpuinfo") as cpuinfo:
        flags = next((line for line in cpuinfo if line.startswith("flags")), "").split()
    if not LEVELS[level] <= set(flags):
        pytest.skip(f"this CPU has no {level}")
    here = os.path.abspath(__file__)
    check = subprocess.run(
        [sys.executable, here, level],
        env={**os.environ, "CRPT_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr


def main(level: str) -> None:
    from crpt import _cpu

    assert _cpu.isa == level
    torch.set_num_threads(1)
    for sample in SAMPLES:
        torch.manual_seed(0)
        for dtype in FLOATS:
            test_values_match_the_twin(sample, dtype, "cpu")
            if sample.differentiable:
                test_gradients_match_the_twin(sample, dtype, "cpu")


if __name__ == "__main__":
    main(sys.argv[1])
