"""The plain-PyTorch twin of every operator: its specification, and the oracle of its tests.

Same names and signatures as `crpt.ops`. Each twin is written in the order of its formula, runs on
every device and in every floating dtype (float64 included), and is differentiable by torch's own
autograd. Inputs are not checked here; see `crpt.ops` for shapes, ranges and errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Scores are measured from their maximum in units of the temperature and cut off here: far below
# what exp can represent, and finite, so that -inf scores cannot make -inf - (-inf).
LOWEST_LOG_KERNEL = -1e30


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    temperature: float = 0.1,
    iterations: int = 3,
    group: ProcessGroup | None = None,
) -> Tensor:
    """codes = Sinkhorn-Knopp(exp(scores / T)) in log space, [..., B, M] -> [..., B, M].

    With a group B counts the samples of all its processes, at least one each.
    """
    batch, prototypes = scores.shape[-2:]
    if group is not None:
        count = torch.tensor(batch, device=scores.device)
        batch = int(_over(group, dist.ReduceOp.SUM, count))
    log_b = torch.tensor(float(batch), dtype=torch.float64).log().item()
    log_m = torch.tensor(float(prototypes), dtype=torch.float64).log().item()
    s = scores.to(_compute_dtype(scores.dtype))
    top = s.amax(dim=(-2, -1), keepdim=True)
    if group is not None:
        top = _over(group, dist.ReduceOp.MAX, top)
    top = top.clamp_min(torch.finfo(s.dtype).min)
    log_q = ((s - top) / temperature).clamp_min(LOWEST_LOG_KERNEL)  # [..., B, M]
    for _ in range(iterations):
        log_q = log_q - _logsumexp_of_samples(log_q, group) - log_m  # each prototype sums to 1/M
        log_q = log_q - log_q.logsumexp(dim=-1, keepdim=True) - log_b  # each sample sums to 1/B
    return log_q.softmax(dim=-1).to(scores.dtype)  # each sample's codes sum to 1


def _logsumexp_of_samples(log_q: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is None:
        return log_q.logsumexp(dim=-2, keepdim=True)
    peak = _over(group, dist.ReduceOp.MAX, log_q.amax(dim=-2, keepdim=True))
    total = _over(group, dist.ReduceOp.SUM, (log_q - peak).exp().sum(dim=-2, keepdim=True))
    return peak + total.log()


def _over(group: ProcessGroup, operation: dist.ReduceOp.RedOpType, x: Tensor) -> Tensor:
    """x, reduced over the processes of the group."""
    dist.all_reduce(x, operation, group)
    return x


def prototype_similarity(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """similarity_bm = <e_b, c_m> / (|e_b| |c_m|), [..., B, D] and [..., M, D] -> [..., B, M]."""
    compute = _compute_dtype(embeddings.dtype)
    e = F.normalize(embeddings.to(compute), dim=-1, eps=1e-12)
    c = F.normalize(prototypes.to(compute), dim=-1, eps=1e-12)
    return (e @ c.mT).to(embeddings.dtype)


def prototype_loss(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    """loss = -mean_b sum_m codes_bm log softmax_m(scores_b / T), two [..., B, M] -> [...]."""
    compute = _compute_dtype(scores.dtype)
    log_p = (scores.to(compute) / temperature).log_softmax(dim=-1)
    return -(codes.to(compute) * log_p).sum(dim=-1).mean(dim=-1).to(scores.dtype)


def prototype_objective(
    embeddings: Tensor,
    prototypes: Tensor,
    codes: Tensor,
    temperature: float = 0.1,
    intrinsic_weight: float = 0.005,
    offset: float = 1.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss = comparison + w intrinsic, comparison of e_b / |e_b| with the prototypes as they are.

    [..., B, D], [..., M, D], [..., B, M] -> loss, comparison, intrinsic, each [...].
    """
    compute = _compute_dtype(embeddings.dtype)
    e = F.normalize(embeddings.to(compute), dim=-1, eps=1e-12)
    c = prototypes.to(compute)
    comparison = prototype_loss(e @ c.mT, codes.detach().to(compute), temperature)
    intrinsic = intrinsic_loss(c, offset)
    loss = comparison + intrinsic_weight * intrinsic if intrinsic_weight > 0 else comparison
    dtype = embeddings.dtype
    return loss.to(dtype), comparison.detach().to(dtype), intrinsic.detach().to(dtype)


def intrinsic_loss(prototypes: Tensor, offset: float = 1.5) -> Tensor:
    """loss = 1/M^2 sum_{i != j} s_ij / (sg(s_ij) + offset), s_ij = sg(c_i) . c_j.

    [..., M, D] -> [...].
    """
    c = prototypes.to(_compute_dtype(prototypes.dtype))
    m = c.shape[-2]
    s = c.detach() @ c.mT  # [..., M, M]; the gradient reaches c_j (the column) only
    ratio = s / (s.detach() + offset)
    off_diagonal = ~torch.eye(m, dtype=torch.bool, device=c.device)
    return torch.where(off_diagonal, ratio, 0.0).sum(dim=(-2, -1)).div(m * m).to(prototypes.dtype)


def random_shift(
    images: Tensor,
    pad: int = 4,
    shifts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """out[b, c, y, x] = images[b, c, clamp(y + dy_b), clamp(x + dx_b)], shape as images."""
    batch, _, height, width = images.shape
    if shifts is None:
        shifts = torch.randint(-pad, pad + 1, (batch, 2), generator=generator, device=images.device)
    y = (torch.arange(height, device=images.device) + shifts[:, :1]).clamp(0, height - 1)  # [B, H]
    x = (torch.arange(width, device=images.device) + shifts[:, 1:]).clamp(0, width - 1)  # [B, W]
    b = torch.arange(batch, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[b, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def frame_stack(
    frames: Tensor,
    index: Tensor,
    shifts: Tensor | None = None,
    pad: int = 4,
    dtype: torch.dtype = torch.uint8,
    out: Tensor | None = None,
) -> Tensor:
    """out[b] = cast(shift(concatenate_k frames[index[b, k]])).

    [N, C, H, W], [B, K] -> [B, K*C, H, W].
    """
    stacked = frames[index].flatten(1, 2)  # [B, K*C, H, W]
    if shifts is not None:
        stacked = random_shift(stacked, pad, shifts)
    if dtype != torch.uint8:
        compute = _compute_dtype(dtype)
        # By a tensor: instead of dividing by a number torch multiplies by its inverse on a GPU.
        stacked = (stacked.to(compute) / stacked.new_full((), 255, dtype=compute)).to(dtype)
    return stacked if out is None else out.copy_(stacked)


def knn_distance(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """distance_b = k-th smallest over q of |queries_b - keys_q|, [B, D], [Q, D] -> [B]."""
    compute = _compute_dtype(queries.dtype)
    distance = torch.cdist(
        queries.to(compute), keys.to(compute), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distance.kthvalue(k, dim=-1).values.to(queries.dtype)
