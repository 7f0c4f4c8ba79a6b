"""Batch norm of a batch that several processes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from crpt.standardisation import Standardisation


class _SumOverTeam(torch.autograd.Function):
    """The sum over processes, of values and, backwards, of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


_sum_over_team: Callable[[Tensor, dist.ProcessGroup], Tensor] = _SumOverTeam.apply


def _settings(
    norm: nn.BatchNorm1d,
) -> tuple[int, float, float | None, torch.device, torch.dtype]:
    """What `Standardisation` is made with, to be where that norm is."""
    at = norm.running_mean
    assert at is not None
    return norm.num_features, norm.eps, norm.momentum, at.device, at.dtype


class TeamBatchNorm1d(Standardisation):
    """BatchNorm1d over the rows of all processes; torch's SyncBatchNorm is for GPUs only.

    Every process has the same number of rows. Its buffers are those of BatchNorm1d.
    """

    def __init__(self, norm: nn.BatchNorm1d, group: dist.ProcessGroup) -> None:
        super().__init__(*_settings(norm))
        self.load_state_dict(norm.state_dict())
        self.train(norm.training)
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> Standardisation:
        """A copy belongs to no team."""
        norm = Standardisation(*_settings(self))
        norm.load_state_dict(self.state_dict())
        return norm.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rows = len(x) * self.group.size()
        mean = _sum_over_team(x.sum(dim=0), self.group) / rows
        centred = x - mean
        variance = _sum_over_team(centred.square().sum(dim=0), self.group) / rows
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        return centred / (variance + self.eps).sqrt()
