"""The way past the dispatcher: what it computes is what the dispatcher's way does, and every call in
which torch has something to decide takes the latter."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from operator_samples import Sample
from test_common import differentiable, dtypes, gradients, samples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from crpt import ops
from crpt.ops import autograd, direct

SCORES = torch.rand(6, 5)
CODES = torch.rand(6, 5).softmax(-1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every call of an operator from Python, whether it went past the dispatcher."""
    seen: list[bool] = []

    def kernel_for(name: str, args: Any) -> Any:
        kernel = direct.kernel_for(name, args)
        seen.append(kernel is not None)
        return kernel

    monkeypatch.setattr(autograd, "kernel_for", kernel_for)
    return seen


def by_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "kernel_for", lambda name, args: None)


@samples
@dtypes
def test_values_are_the_dispatchers(
    sample: Sample, dtype: torch.dtype, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, kwargs = sample.arguments(dtype)
    got = sample.function(*args, **kwargs)
    assert taken == [True] or "out" in kwargs
    by_the_dispatcher(monkeypatch)
    expected = sample.function(*args, **kwargs)
    assert torch.equal(got, expected)
    assert (got.dtype, got.stride()) == (expected.dtype, expected.stride())


@differentiable
@dtypes
def test_gradients_are_the_dispatchers(
    sample: Sample, dtype: torch.dtype, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, kwargs = sample.arguments(dtype, requires_grad=True)
    weight = torch.randn_like(sample.twin(*args, **kwargs))
    out = sample.function(*args, **kwargs)
    got = gradients(sample.function, args, kwargs, weight)
    assert len(taken) >= 3  # twice forward, and back
    assert all(taken)
    by_the_dispatcher(monkeypatch)
    through = sample.function(*args, **kwargs)
    assert out.grad_fn is not None
    assert through.grad_fn is not None
    assert out.grad_fn.name() == through.grad_fn.name()
    expected = gradients(sample.function, args, kwargs, weight)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@differentiable
def test_no_gradient_is_kept_where_none_is_wanted(sample: Sample, taken: list[bool]) -> None:
    args, kwargs = sample.arguments(torch.float32, requires_grad=True)
    with torch.no_grad():
        assert not sample.function(*args, **kwargs).requires_grad
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    assert not sample.function(*plain, **kwargs).requires_grad
    assert all(taken)


def test_parameters_other_threads_and_saved_tensor_hooks_go_directly(taken: list[bool]) -> None:
    parameter, packed = torch.nn.Parameter(SCORES), []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = ops.prototype_loss(parameter, CODES)
    assert packed
    (expected,) = torch.autograd.grad(ops.prototype_loss(parameter, CODES), parameter)
    assert torch.equal(torch.autograd.grad(loss, parameter)[0], expected)
    thread = threading.Thread(target=ops.sinkhorn, args=(SCORES,))
    thread.start()
    thread.join()
    assert len(taken) == 5
    assert all(taken)


class Subclass(Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device() -> Iterator[None]:
    with torch.device("cpu"):
        yield


MODES: dict[str, Callable[[], Any]] = {
    "function mode": Functions,
    "dispatch mode": Dispatch,
    "default device": default_device,
    "autocast": lambda: torch.autocast("cpu"),
    "inference": torch.inference_mode,
    "profiler": torch.profiler.profile,
    "older profiler": torch.autograd.profiler.profile,
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_take_the_dispatchers_way(mode: str, taken: list[bool]) -> None:
    expected = ops.sinkhorn(SCORES)
    with MODES[mode]():
        assert torch.equal(ops.sinkhorn(SCORES), expected)
    ops.sinkhorn(SCORES)
    assert taken == [True, False, True]


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return SCORES.clone()


TENSORS: dict[str, Callable[[], Tensor]] = {
    "subclass": lambda: SCORES.clone().as_subclass(Subclass),
    "negated view": lambda: torch._neg_view(-SCORES),
    "zero tensor": lambda: torch._efficientzerotensor((6, 5)),
    "inference tensor": inference_tensor,
    "meta": lambda: SCORES.to("meta"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_other_tensors_take_the_dispatchers_way(kind: str, taken: list[bool]) -> None:
    x = TENSORS[kind]()
    codes = ops.sinkhorn(x)
    loss = ops.prototype_loss(x, CODES.to(x.device))
    ops.prototype_loss(SCORES.to(x.device), x)  # also where only the second is another
    assert not any(taken)
    if kind != "meta":
        plain = torch.zeros(6, 5) if kind == "zero tensor" else SCORES
        assert torch.equal(codes.clone().as_subclass(Tensor), ops.sinkhorn(plain))
        assert torch.equal(loss.clone().as_subclass(Tensor), ops.prototype_loss(plain, CODES))


def test_fakes_tracers_and_transforms_take_the_dispatchers_way(taken: list[bool]) -> None:
    with FakeTensorMode() as mode:
        assert ops.sinkhorn(mode.from_tensor(SCORES)).shape == SCORES.shape
    traced = torch.jit.trace(ops.sinkhorn, (SCORES,), check_trace=False)
    assert "crpt::sinkhorn" in str(traced.graph)
    graph = make_fx(lambda x: ops.sinkhorn(x))(SCORES)
    assert torch.ops.crpt.sinkhorn.default in {node.target for node in graph.graph.nodes}
    torch.func.vmap(ops.sinkhorn)(SCORES[None])
    torch.func.grad(ops.prototype_loss)(SCORES, CODES)
    assert not any(taken)
    torch._dynamo.reset()
    with ExitStack() as stack:
        stack.callback(torch._dynamo.reset)
        compiled = torch.compile(ops.sinkhorn, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(SCORES), ops.sinkhorn(SCORES))
    assert taken[-1]
    assert sum(taken) == 1


def test_a_mode_in_the_backward_pass_alone_is_seen(taken: list[bool]) -> None:
    scores = SCORES.clone().requires_grad_()
    loss = ops.prototype_loss(scores, CODES)
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        loss.backward()
    assert "crpt.prototype_loss_backward.default" in called
    assert taken == [True, False]


def test_the_profiler_shows_operators_by_name() -> None:
    scores = SCORES.clone().requires_grad_()
    with torch.profiler.profile() as profile:
        ops.prototype_loss(scores, ops.sinkhorn(scores)).backward()
    names = {event.name for event in profile.events()}
    assert {"crpt::sinkhorn", "crpt::prototype_loss", "crpt::prototype_loss_backward"} <= names


@differentiable
def test_second_derivatives_are_refused_or_right(sample: Sample, taken: list[bool]) -> None:
    args, kwargs = sample.arguments(torch.float64, requires_grad=True)
    inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    out = sample.function(*args, **kwargs)
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    total = torch.stack([g.square().sum() for g in grads]).sum()
    if sample.operator == "random_shift":
        assert torch.autograd.grad(total, inputs)[0].isfinite().all()
    else:
        with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
            torch.autograd.grad(total, inputs)
    assert all(taken)


def test_plain_keys_are_those_that_torch_gives() -> None:
    assert torch._C._dispatch_keys(SCORES).raw_repr() == direct._plain_keys("CPU")
    if torch.cuda.is_available():
        assert torch._C._dispatch_keys(SCORES.cuda()).raw_repr() == direct._plain_keys("CUDA")
    assert direct._thread_keys() == direct._PLAIN_THREAD


@pytest.mark.parametrize("mode", ["autocast('cpu')", "inference_mode()", "device('meta')"])
def test_what_is_plain_does_not_depend_on_the_mode_of_the_import(mode: str) -> None:
    code = (
        f"import torch\nwith torch.{mode}:\n    from crpt.ops import direct\n"
        "print(direct.kernel_for('sinkhorn', (torch.ones(2, 3), 0.1, 3)) is not None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("gone", ["_dispatch_tls_local_include_set", "_autograd._profiler_enabled"])
def test_a_torch_that_tells_no_keys_decides_itself(gone: str) -> None:
    code = (
        f"import torch\ndel torch._C.{gone}\nfrom crpt import ops\n"
        "x = torch.ones(2, 3)\nassert ops.direct.kernel_for('sinkhorn', (x,)) is None\n"
        "assert torch.equal(ops.sinkhorn(x), torch.full((2, 3), 1 / 3))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
