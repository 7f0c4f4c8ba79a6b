"""Sinkhorn-Knopp over a batch that is spread over the processes of a group.

Composed of torch's own operators, for every device. What processes exchange is one all-reduce of M
values to prepare, and one in each iteration, which itself reads or writes [B, M] nine times.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from crpt.ops.conditions import compute_dtype
from crpt.ops.reference import LOWEST_LOG_KERNEL

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@torch.no_grad()
def sinkhorn_group(
    scores: Tensor, temperature: float, iterations: int, group: dist.ProcessGroup
) -> Tensor:
    """This process's rows, [..., B, M], of the global batch's codes.

    Only the prototypes' sums depend on other processes. Theirs is a sum of exponentials, which in
    the first iteration is measured from the prototype's largest score and so at least 1. Later no
    such measure is needed: of prototypes with equal mass, the normalisation of the samples leaves
    each at least 1 / (B M) of all mass. So scores of any width are safe in one all-reduce, and
    nothing is decided by a value that the host would have to read.
    """
    s = scores.to(compute_dtype(scores.dtype))
    high = _largest(s, group)  # [..., 1, M]
    top = high.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(s.dtype).min)
    log_q = _log_kernel(s, top, temperature)
    if iterations > 0:
        peak = _log_kernel(high, top, temperature)
        log_q = _balance(log_q, peak + _sum((log_q - peak).exp(), group).log())
    for _ in range(iterations - 1):
        log_q = _balance(log_q, _sum(log_q.exp(), group).log())
    return (log_q.exp() if iterations > 0 else log_q.softmax(dim=-1)).to(scores.dtype)


def _balance(log_q: Tensor, log_sum: Tensor) -> Tensor:
    """Prototypes to one mass, then samples: to 1, where the formula has 1/B, which would cancel."""
    return (log_q - log_sum).log_softmax(dim=-1)


def _log_kernel(s: Tensor, top: Tensor, temperature: float) -> Tensor:
    return ((s - top) / temperature).clamp_min(LOWEST_LOG_KERNEL)


def _largest(s: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Each prototype's largest score in the global batch; NaN where one of its scores is NaN."""
    if s.shape[-2] > 0:
        high = s.amax(dim=-2, keepdim=True)
    else:
        high = s.new_full((*s.shape[:-2], 1, s.shape[-1]), -torch.inf)
    # What a maximum over processes makes of NaN is the backend's choice; among these integers it is
    # the largest, above infinity, once all NaN are the same one.
    bits = torch.where(high.isnan(), torch.nan, high).view(_BITS[high.dtype])
    keys = _in_order(bits)
    dist.all_reduce(keys, dist.ReduceOp.MAX, group)
    return _in_order(keys).view(high.dtype)


def _in_order(bits: Tensor) -> Tensor:
    """The bits of floating-point numbers as integers in the same order, and back again."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums over the samples of the global batch, [..., B, M] -> [..., 1, M]."""
    total = x.sum(dim=-2, keepdim=True)
    dist.all_reduce(total, group=group)
    return total
