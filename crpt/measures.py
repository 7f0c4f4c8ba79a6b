"""Numbers that tell whether an encoder and its prototypes are alive."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """exp(-sum_i p_i log p_i), p_i = sigma_i / sum_j sigma_j, of the centred embeddings [B, D].

    Between 1 (all on a line) and min(B - 1, D). Roy and Vetterli, 2007. 0 when all embeddings are
    equal.
    """
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    sigma = torch.linalg.svdvals(centred)
    # What remains of equal embeddings is rounding, which has full rank and means nothing.
    if sigma.max() <= 1e-6 * embeddings.double().norm(dim=-1).mean() * math.sqrt(len(embeddings)):
        return 0.0
    p = sigma / sigma.sum()
    return float(torch.exp(torch.special.entr(p).sum()))


@torch.no_grad()
def prototypes_in_use(codes: Tensor) -> int:
    """Number of prototypes that are some sample's first choice, codes [B, M]."""
    return int(codes.argmax(dim=-1).unique().numel())


@torch.no_grad()
def assignment_perplexity(codes: Tensor) -> float:
    """exp of the mean entropy of a sample's codes, [B, M]: 1 when certain, M when the codes are
    uniform."""
    return float(torch.exp(torch.special.entr(codes.double()).sum(dim=-1).mean()))
