"""Registration of fakes and gradients, shared by the operators' files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from crpt.ops.schemas import LIBRARY


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What the operator returns, in shape, dtype and strides, without computing it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"crpt::{name}", function, lib=LIBRARY)
        return function

    return register


def gradient(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(f"crpt::{name}", backward, setup_context=setup, lib=LIBRARY)


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
