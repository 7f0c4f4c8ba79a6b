"""Registration of fakes and gradients, shared by the operators' files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from crpt.ops.schemas import LIBRARY

_C: Any = torch._C


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What the operator returns, in shape, dtype and strides, without computing it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"crpt::{name}", function, lib=LIBRARY)
        return function

    return register


def gradient(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """torch.library.register_autograd for schemas without default values, at half its 25 us a call:
    it looks for such values in the schema each time."""
    operator = getattr(torch.ops.crpt, name).default

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        output = below(keyset, tuple(inputs))
        setup(ctx, tuple(inputs), output)
        return output

    def backward_with_keyset(ctx: Any, *grads: Any) -> Any:
        result = backward(ctx, *grads)
        return (*result, None) if isinstance(result, tuple) else (result, None)

    function: Any = type(
        f"GradientOf_crpt_{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward_with_keyset)},
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        return below(keyset, args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


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
