"""What the operators' checks are made of: a condition each, and the error where it fails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMAGES = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
STACKS = (*FLOATS, torch.uint8)
LARGEST_PAD = 2**31 - 1  # position + shift is far from overflow
# Normal numbers whose inverse is one too, of the type that each dtype is computed in.
_INVERTIBLE = {
    dtype: (2.0**-power, 2.0**power)
    for dtype, power in (
        (torch.float32, 126), (torch.float16, 126), (torch.bfloat16, 126), (torch.float64, 1022),
    )
}  # fmt: skip
MOST_ITERATIONS = 100_000  # more is a mistake, which nothing could interrupt


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hold(*conditions: bool | torch.SymBool) -> bool:
    """Whether all hold. Of sizes that depend on data, a compiled graph asserts it as it runs."""
    for condition in conditions:
        if not isinstance(condition, bool):
            from torch.fx.experimental.symbolic_shapes import expect_true  # slow to import

            condition = expect_true(condition)
        if not condition:
            return False
    return True


def equal(shape: Sequence[int], other: Sequence[int]) -> bool:
    if len(shape) != len(other):
        return False
    for i, j in zip(shape, other, strict=True):  # a loop: this is called several times a call
        same = i == j
        if same is not True and not hold(same):
            return False
    return True


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def require_floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} should be {names_of(FLOATS)}, got {value.dtype}")


def require_same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} should be on {device}, got {value.device}")


def require_same_kind(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise TypeError(f"{name} should be {like.dtype} like {like_name}, got {value.dtype}")
    require_same_device(name, value, like.device)


def require_computed(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} should be float32 or float64, got {value.dtype}")


def require(
    name: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name} should be {dtype}, got {value.dtype}")
    if not equal(value.shape, shape):
        raise ValueError(f"{name} should be {list(shape)}, got {list(value.shape)}")
    require_same_device(name, value, device)


def require_broadcast(name: str, leading: Sequence[int], others: Sequence[int]) -> None:
    for i, j in zip(reversed(leading), reversed(others), strict=False):
        if i != j and i != 1 and j != 1:
            raise ValueError(
                f"{name} should have leading dimensions that broadcast with "
                f"{list(others)}, got {list(leading)}"
            )


def require_images_shape(name: str, value: Tensor, count: str) -> None:
    shape = value.shape
    if len(shape) != 4 or not hold(shape[1] >= 1, shape[2] >= 1, shape[3] >= 1):
        raise ValueError(
            f"{name} should be [{count}, C, H, W] with C, H, W >= 1, got {list(shape)}"
        )


def require_scores_shape(name: str, value: Tensor) -> None:
    shape = value.shape
    if len(shape) < 2 or not hold(shape[-2] >= 1, shape[-1] >= 1):
        raise ValueError(f"{name} should be [..., B, M] with B, M >= 1, got {list(shape)}")


def require_shifts(shifts: Tensor, batch: int, device: torch.device) -> None:
    if shifts.dtype != torch.int64:
        raise TypeError(f"shifts should be torch.int64, got {shifts.dtype}")
    if not equal(shifts.shape, (batch, 2)):
        raise ValueError(f"shifts should be [{batch}, 2], got {list(shifts.shape)}")
    require_same_device("shifts", shifts, device)


def require_iterations(iterations: int) -> None:
    require_at_least("iterations", iterations, 0)
    require_at_most("iterations", iterations, MOST_ITERATIONS)


def require_pad(pad: int) -> None:
    require_at_least("pad", pad, 0)
    require_at_most("pad", pad, LARGEST_PAD)


def require_positive(name: str, value: float, dtype: torch.dtype) -> None:
    """For inputs of that dtype: what divides by the value, or multiplies by its inverse, meets no
    zero and no infinity that the value itself is not."""
    least, most = _INVERTIBLE[dtype]
    if least <= value <= most:
        return
    if not 0 < value < math.inf:
        raise ValueError(f"{name} should be positive and finite, got {value}")
    compute = str(compute_dtype(dtype)).removeprefix("torch.")
    raise ValueError(
        f"{name} should be in [{least:.3g}, {most:.3g}], where {compute} holds it and its inverse, "
        f"got {value}"
    )


def require_at_least(name: str, value: int, least: int) -> None:
    if not hold(value >= least):
        raise ValueError(f"{name} should be >= {least}, got {value}")


def require_at_most(name: str, value: int, most: int) -> None:
    if not hold(value <= most):
        raise ValueError(f"{name} should be <= {most}, got {value}")
