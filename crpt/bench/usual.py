"""What people run today, written as well as they would write it: the named alternatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crpt.ops import reference


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float = 0.1, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp on exp(scores / T) itself, as in SwAV's and Proto-RL's code."""
    batch, prototypes = scores.shape[-2:]
    q = torch.exp((scores - scores.amax((-2, -1), keepdim=True)) / temperature)  # [..., B, M]
    q /= q.sum((-2, -1), keepdim=True)
    for _ in range(iterations):
        q /= q.sum(-2, keepdim=True) * prototypes
        q /= q.sum(-1, keepdim=True) * batch
    return q * batch


def prototype_loss(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    return F.cross_entropy(scores / temperature, codes)


def intrinsic_loss(prototypes: Tensor, offset: float = 1.5) -> Tensor:
    m = len(prototypes)
    s = prototypes.detach() @ prototypes.T
    ratio = s / (s.detach() + offset)
    return (ratio.sum() - ratio.diagonal().sum()) / (m * m)


def objective(online: Tensor, target: Tensor, prototypes: Tensor) -> Tensor:
    """crpt.objectives.crptpro from the embeddings on, in plain PyTorch."""
    with torch.no_grad():
        t = F.normalize(target, dim=-1)
        codes = sinkhorn(t @ prototypes.T)
    s = F.normalize(online, dim=-1)
    comparison = reference.prototype_loss(s @ prototypes.T, codes)
    return comparison + 0.005 * intrinsic_loss(prototypes)


def random_shift(images: Tensor, pad: int, shifts: Tensor) -> Tensor:
    """DrQ-v2's RandomShiftsAug: replicate-pad, then bilinear grid_sample at whole offsets."""
    x = F.pad(images.float(), (pad,) * 4, "replicate")
    n, _, padded, _ = x.shape
    h = padded - 2 * pad
    eps = 1.0 / padded
    line = torch.linspace(-1.0 + eps, 1.0 - eps, padded, device=x.device)[:h]
    line = line.unsqueeze(0).repeat(h, 1).unsqueeze(2)
    base = torch.cat([line, line.transpose(1, 0)], dim=2).unsqueeze(0).repeat(n, 1, 1, 1)
    offsets = (shifts.flip(-1) + pad).view(n, 1, 1, 2).to(x.dtype) * (2.0 / padded)  # (x, y)
    return F.grid_sample(x, base + offsets, padding_mode="zeros", align_corners=False)


def knn_distance(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    return torch.cdist(queries, keys).topk(k, dim=-1, largest=False).values[:, -1]
