"""Registration of fakes and gradients, shared by the operators' files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from crpt.ops.schemas import LIBRARY

_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What the operator returns, in shape, dtype and strides, without computing it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"crpt::{name}", function, lib=LIBRARY)
        return function

    return register


def gradient(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(f"crpt::{name}", backward, setup_context=setup, lib=LIBRARY)
    operator = getattr(torch.ops.crpt, name)

    def forward(*args: Any) -> Any:
        return operator(*args)

    body = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    _FUNCTIONS[name] = type(name, (torch.autograd.Function,), body)


def call(name: str, *args: Any) -> Any:
    """torch.ops.crpt.name(*args), also inside the transforms of torch.func.

    There torch refuses the gradients that register_autograd knows, and takes those of a Function;
    which in turn torch.compile refuses, so that compiled graphs know no gradients of torch.func.
    """
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        return _FUNCTIONS[name].apply(*args)
    return getattr(torch.ops.crpt, name)(*args)


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
