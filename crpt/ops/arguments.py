"""The arguments of the public functions, before the dispatcher sees them."""

from __future__ import annotations

import functools
from numbers import Integral, Real
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from crpt.ops import cuda

DEVICES = ("cpu", "cuda", "meta") if cuda.AVAILABLE else ("cpu", "meta")


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} should be dense, got {value.layout}")
    if value.is_nested:
        raise ValueError(f"{name} should be one dense tensor, got a nested one")
    if not value.is_cpu and value.device.type not in DEVICES:
        hint = ""
        if value.device.type == "cuda":
            hint = " (this installation of crpt has no CUDA kernels: see `python -m crpt.doctor`)"
        raise ValueError(f"{name} should be on {' or '.join(DEVICES)}, got {value.device}{hint}")
    # torch would give an operator's result a tangent of zero, without a word. Tangents live in
    # levels, and there is almost never one.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} should have no tangent: forward-mode derivatives are not supported"
        )


def pair(names: tuple[str, str], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors; under autocast, mixed floating dtypes are promoted to the widest."""
    tensor(names[0], first)
    tensor(names[1], second)
    if first.dtype != second.dtype and _promotes(first, second):
        widest = torch.promote_types(first.dtype, second.dtype)
        return first.to(widest), second.to(widest)
    return first, second


def several(names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same for any number."""
    for name, value in zip(names, tensors, strict=True):
        tensor(name, value)
    first = tensors[0].dtype
    if any(value.dtype != first for value in tensors) and _promotes(*tensors):
        widest = functools.reduce(torch.promote_types, (value.dtype for value in tensors))
        return tuple(value.to(widest) for value in tensors)
    return tensors


def _promotes(*tensors: Tensor) -> bool:
    device = tensors[0].device.type
    return (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and all(value.is_floating_point() for value in tensors)
    )


def real(name: str, value: object) -> float:
    if type(value) is float:
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} should be finite, got one beyond a float's range") from None
    raise TypeError(f"{name} should be a float, got {type(value).__name__}")


def integer(name: str, value: object) -> int:
    if isinstance(value, torch.SymInt):  # while torch traces: any value, in range of 64 bits
        return cast(int, value)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} should be an int, got {type(value).__name__}")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        bits = number.bit_length()
        raise ValueError(f"{name} should fit in 64 bits, got an int of {bits} bits")
    return number


def process_group(value: object) -> None:
    if not dist.is_available() or not isinstance(value, dist.ProcessGroup):
        # Where new_group leaves this process out, it returns a placeholder.
        raise TypeError(
            "group should be a torch.distributed.ProcessGroup that this process belongs to, "
            f"got {type(value).__name__}"
        )


def generator(value: object, device: torch.device) -> None:
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator should be a torch.Generator, got {type(value).__name__}")
    own = value.device
    if own.type == "cuda" and own.index is None:  # torch.Generator("cuda") is of the current device
        own = torch.device("cuda", torch.cuda.current_device())
    if own != device:
        raise ValueError(f"generator should be on {device}, got {value.device}")
