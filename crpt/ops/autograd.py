"""Registration of fakes and gradients, shared by the operators' files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from crpt.ops.direct import kernel_for
from crpt.ops.schemas import LIBRARY

_C: Any = torch._C
# torch >= 2.7 has it in C++.
_any_requires_grad: Callable[..., bool] = getattr(
    _C, "_any_requires_grad", lambda *args: any(getattr(x, "requires_grad", False) for x in args)
)
# torch.func.vmap of 2.6 knows no gradient that is None; that of 2.13 does.
_MATERIALIZES = torch.__version__ < "2.13"
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_APPLY: dict[str, Callable[..., Any]] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What the operator returns, in shape, dtype and strides, without computing it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"crpt::{name}", function, lib=LIBRARY)
        return function

    return register


def gradient(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Makes `backward` the gradient of the operator, for torch's autograd and for torch.func."""
    operator = getattr(torch.ops.crpt, name)
    _register(name, operator.default, backward, setup)

    def forward(*args: Any) -> Any:
        return operator(*args)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        setup(ctx, inputs, output)
        if _MATERIALIZES:
            ctx.set_materialize_grads(True)

    body = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    _FUNCTIONS[name] = type(name, (torch.autograd.Function,), body)


def _register(
    name: str, operator: Any, backward: Callable[..., Any], setup: Callable[..., None]
) -> None:
    """torch.library.register_autograd for schemas without default values, 20 us a call faster: that
    one looks for default values in the schema each time."""

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, compute = args
        output = compute(*inputs)
        setup(ctx, tuple(inputs), output)
        return output

    def backward_and_compute(ctx: Any, *grads: Any) -> Any:
        result = backward(ctx, *grads)
        return (*result, None) if isinstance(result, tuple) else (result, None)

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward_and_compute)}
    function: Any = type(f"crpt_{name}", (torch.autograd.Function,), body)
    # What Function.apply calls where no transform of torch.func is active.
    _APPLY[name] = super(torch.autograd.Function, function).apply

    def kernel(keyset: Any, *args: Any) -> Any:
        def below(*inputs: Any) -> Any:
            with _C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & _C._after_autograd_keyset, *inputs)

        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return function.apply(*args, below)
        return below(*args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def call(name: str, *args: Any) -> Any:
    """torch.ops.crpt.name(*args), also inside the transforms of torch.func.

    There torch refuses the gradients that are registered with an operator, and takes those of a
    Function; which in turn torch.compile refuses, so that compiled graphs know no gradients of
    torch.func. Plain calls reach their kernel directly.
    """
    if not torch.compiler.is_compiling():
        kernel = kernel_for(name, args)
        if kernel is not None:
            if torch.is_grad_enabled() and _any_requires_grad(*args) and name in _APPLY:
                return _APPLY[name](*args, kernel)
            with _C._AutoDispatchBelowAutograd():
                return kernel(*args)
        if name in _FUNCTIONS and in_transform():
            return _FUNCTIONS[name].apply(*args)
    operator = getattr(torch.ops.crpt, name)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*args)
    with _C._AutoDispatchBelowAutograd():  # nothing to do there, but a call of Python
        return operator(*args)


def in_transform() -> bool:
    """Whether this runs inside torch.func.grad, vmap or the like, outside a compiled graph."""
    return _C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def under_vmap(x: torch.Tensor) -> bool:
    """Whether x holds the samples of a vmap, however many transforms lie around it."""
    functorch = _C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def differentiable_once(name: str) -> None:
    """Makes the gradient of `name`, itself a gradient, an error instead of a wrong number."""

    def refuse(*_: object) -> None:
        raise NotImplementedError(
            f"crpt::{name} is a first derivative; second derivatives are not supported"
        )

    gradient(name, refuse, lambda ctx, inputs, output: None)


def not_differentiable(name: str) -> None:
    """Results carry no gradient, whatever the inputs require."""
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
