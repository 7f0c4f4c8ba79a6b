"""Batch norm that a cast to half precision does not touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn


def exactly(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What Module.to and the like do to tensors, but for casts to less than float32."""

    def apply(x: Tensor) -> Tensor:
        y = fn(x)
        less = y.is_floating_point() and y.dtype.itemsize < 4
        return x.to(y.device, torch.float32) if less else y

    return apply


class Standardisation(nn.BatchNorm1d):
    """Batch norm without affine, in float32 at least: a cast of the module to half precision leaves
    its running statistics as exact as they were."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine=False, device=device, dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        cast(Any, super())._apply(exactly(fn), recurse)  # torch has no types for it
        return self
