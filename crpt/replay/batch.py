"""What is drawn: a batch of transitions, and the settings that turn steps into tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from crpt.ops import cpu_memory
from crpt.replay.spec import DomainSpec

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""The kernels' number of each floating type."""

# Bytes. Two arrays of a batch given back to malloc are returned to the system long before one is.
_WORTH_KEEPING = 4 << 20


@dataclass(frozen=True)
class Batch:
    """Transitions of one domain, or of several, one domain's rows after the other's."""

    obs: Tensor  # [B, K*C, H, W], oldest frame first
    action: Tensor  # [B, A], float32; of a mixture A is the longest, and shorter ones end in zeros
    reward: Tensor  # [B], float32
    discount: Tensor  # [B], float32: 0 where the episode terminated
    next_obs: Tensor  # [B, K*C, H, W]
    domain: Tensor  # [B], int64: index into `domains`
    domains: tuple[str, ...]
    widths: tuple[int, ...]
    """Of each domain, how many numbers its actions have."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value


@dataclass(frozen=True)
class Views:
    """How transitions become tensors."""

    frame_stack: int = 3
    pad: int = 4
    dtype: torch.dtype = torch.uint8
    n_step: int = 1
    gamma: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("frame_stack", 1), ("n_step", 1), ("pad", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} should be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} should be at least {least}, got {value}")
        if self.pad >= 2**31:
            raise ValueError(f"pad should be below 2**31, got {self.pad}")
        if self.dtype is not torch.uint8 and self.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in (torch.uint8, *DTYPES))
            raise TypeError(f"dtype should be one of {names}, got {self.dtype}")
        if not (isfinite(self.gamma) and 0 <= self.gamma <= 1):
            raise ValueError(f"gamma should be in [0, 1], got {self.gamma}")

    @staticmethod
    def of(
        frame_stack: int, pad: int, dtype: torch.dtype | None, n_step: int, gamma: float | None
    ) -> Views:
        if gamma is None and n_step > 1:
            raise ValueError(f"gamma should be given for n_step {n_step}, got None")
        return Views(
            frame_stack, pad, torch.uint8 if dtype is None else dtype, n_step,
            1.0 if gamma is None else float(gamma),
        )  # fmt: skip


def shares(weights: Mapping[str, float], batch_size: int, chance: float) -> list[int]:
    """Rows of each domain: B w_i / sum(w) on average over `chance` in [0, 1), and never further
    from it than one row."""
    total, so_far, counts = sum(weights.values()), 0.0, []
    taken = 0
    for i, weight in enumerate(weights.values()):
        so_far += weight
        upto = int(batch_size * so_far / total + chance) if i + 1 < len(weights) else batch_size
        upto = min(max(upto, taken), batch_size)
        counts.append(upto - taken)
        taken = upto
    return counts


def empty_batch(
    specs: Mapping[str, DomainSpec],
    batch_size: int,
    views: Views,
    *,
    device: torch.device,
    pin_memory: bool = False,
) -> Batch:
    """A batch to be filled: on the CPU of memory that is used again once nobody holds it."""
    frame_shapes = {spec.frame_shape for spec in specs.values()}
    if len(frame_shapes) > 1:
        got = ", ".join(f"{name} {list(spec.frame_shape)}" for name, spec in specs.items())
        raise ValueError(f"frames of all domains of a mixture should be of one shape, got {got}")
    channels, height, width = frame_shapes.pop()
    shape = (batch_size, views.frame_stack * channels, height, width)
    action_shapes = [spec.action_shape for spec in specs.values()]
    if len(action_shapes) == 1:
        action_shape = action_shapes[0]
    elif any(len(shape) != 1 for shape in action_shapes):
        raise ValueError(f"actions of a mixture should be vectors, got shapes {action_shapes}")
    else:
        action_shape = (max(size for (size,) in action_shapes),)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if device.type != "cpu" or pin_memory:
            return torch.empty(shape, dtype=dtype, device=device, pin_memory=pin_memory)
        return _kept(shape, dtype)

    return Batch(
        obs=empty(shape, views.dtype),
        action=empty((batch_size, *action_shape), torch.float32),
        reward=empty((batch_size,), torch.float32),
        discount=empty((batch_size,), torch.float32),
        next_obs=empty(shape, views.dtype),
        domain=empty((batch_size,), torch.int64),
        domains=tuple(specs),
        widths=tuple(spec.action_shape[0] if spec.action_shape else 1 for spec in specs.values()),
    )


def empty_stacks(spec: DomainSpec, count: int, views: Views) -> Tensor:
    channels, height, width = spec.frame_shape
    return _kept((count, views.frame_stack * channels, height, width), views.dtype)


def _kept(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return cpu_memory.new_empty(torch.empty(0, device="cpu"), shape, dtype, least=_WORTH_KEEPING)


def exact_device(device: torch.device | str) -> torch.device:
    """The device of that name as tensors on it name it: cuda is one of cuda:0, cuda:1, ..."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None:
        current = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return torch.device("cuda", current)
    return device


def check_out(out: Any, like: Batch) -> None:
    """Whether a caller's batch can take what `like`, which may be on the meta device, describes."""
    if not isinstance(out, Batch):
        raise TypeError(f"out should be a Batch, got {type(out).__name__}")
    if (out.domains, out.widths) != (like.domains, like.widths):
        raise ValueError(
            f"out should be of the domains {like.domains} with actions of {like.widths} numbers, "
            f"got {out.domains} and {out.widths}"
        )
    for (name, tensor), (_, wanted) in zip(out.tensors(), like.tensors(), strict=True):
        if tensor.dtype != wanted.dtype:
            raise TypeError(f"out.{name} should be {wanted.dtype}, got {tensor.dtype}")
        if tensor.shape != wanted.shape:
            raise ValueError(f"out.{name} should be {list(wanted.shape)}, got {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"out.{name} should be contiguous, got strides {tensor.stride()}")
        if tensor.device != out.obs.device:
            raise ValueError(
                f"out.{name} should be on {out.obs.device} like out.obs, got {tensor.device}"
            )
