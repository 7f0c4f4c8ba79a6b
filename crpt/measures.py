"""Numbers that tell whether an encoder and its prototypes are alive."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 1024  # rows of a matrix of distances that is never whole
_COLUMNS = 2048  # of embeddings that are never whole in float64


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """exp(-sum_i p_i log p_i), p_i = sigma_i / sum_j sigma_j, of the centred embeddings [B, D].

    Between 1 (all on a line) and min(B - 1, D). Roy and Vetterli, 2007. 0 when all embeddings are
    equal.
    """
    x = embeddings.double()
    centred = x - x.mean(dim=0)
    wide = x.shape[1] > x.shape[0]
    gram = centred @ centred.T if wide else centred.T @ centred
    return _effective_rank(gram.cpu(), 0.0, x.norm(dim=-1).cpu())


@torch.no_grad()
def gram_matrix(embeddings: Tensor) -> Tensor:
    """x x^T in float64, of embeddings x [N, D] of any precision: [N, N], exactly symmetric."""
    n = len(embeddings)
    lower = torch.zeros(n, n, dtype=torch.float64, device=embeddings.device)
    for part in embeddings.split(_COLUMNS, dim=1):
        # Half of an encoder's features are one number in all frames of a domain.
        varies = (part != part[:1]).any(dim=0)
        lower += part[:1, ~varies].double().square().sum()
        x = part[:, varies].double()
        for begin in range(0, n, _BLOCK):
            end = begin + _BLOCK
            lower[begin:end, :end].addmm_(x[begin:end], x[:end].T)
    return lower.tril() + lower.tril(-1).T


@torch.no_grad()
def effective_rank_of_gram(gram: Tensor) -> float:
    """`effective_rank` of embeddings of this `gram_matrix`, [B, B]."""
    gram = gram.cpu()
    mean = gram.mean(dim=0)
    lengths = gram.diagonal().sqrt()
    # Entries as large as the squared lengths were subtracted from each other.
    rounding = float(lengths.square().mean())
    return _effective_rank(gram - mean - mean[:, None] + mean.mean(), rounding, lengths)


def _effective_rank(centred_gram: Tensor, rounding: float, lengths: Tensor) -> float:
    """Of the spectrum of a matrix whose entries are exact to eps * rounding, or to eps of its
    largest eigenvalue; `lengths` are those of the embeddings before they were centred."""
    if not bool(centred_gram.isfinite().all()):
        return math.nan
    # On the CPU: a GPU takes ten times as long for matrices of this size.
    squares = torch.linalg.eigvalsh(centred_gram)
    # Below this an eigenvalue is rounding, of which a root would make eight digits less.
    least = len(squares) * torch.finfo(squares.dtype).eps * squares.max().clamp(min=rounding)
    sigma = torch.where(squares > least, squares, 0.0).sqrt()
    # What remains of equal embeddings is rounding, which has full rank and means nothing.
    if sigma.max() <= 1e-6 * lengths.mean() * math.sqrt(len(lengths)):
        return 0.0
    p = sigma / sigma.sum()
    return float(torch.exp(torch.special.entr(p).sum()))


@torch.no_grad()
def prototypes_in_use(scores: Tensor) -> int:
    """Number of prototypes that are some sample's nearest, by similarities [B, M]: 1 to
    min(B, M).

    Not by codes of Sinkhorn, which spread over all prototypes alike whatever the similarities.
    """
    return int(scores.argmax(dim=-1).unique().numel())


@torch.no_grad()
def usage_entropy(scores: Tensor) -> float:
    """Entropy, in nats, of the shares of the batch to which each prototype is the nearest, by
    similarities [B, M]: 0 when one is nearest to all, log min(B, M) at most, when all are used
    alike.

    Not that of softmax(scores / T) averaged over the batch: at the T of pre-training the softmax of
    a single sample has nearly log M already, also where all samples are one.
    """
    nearest = scores.argmax(dim=-1)
    shares = nearest.bincount(minlength=scores.shape[-1]).double() / len(nearest)
    return float(torch.special.entr(shares).sum())


@torch.no_grad()
def assignment_perplexity(codes: Tensor) -> float:
    """exp of the mean entropy of a sample's codes, [B, M]: 1 when certain, M when the codes are
    uniform."""
    return float(torch.exp(torch.special.entr(codes.double()).sum(dim=-1).mean()))


@torch.no_grad()
def prototype_spread(prototypes: Tensor) -> tuple[float, float]:
    """Mean and largest cosine of two different prototypes, [M, D], M >= 2. Well spread ones have a
    mean near 0; a largest near 1 tells of two that are one."""
    unit = F.normalize(prototypes.double(), dim=-1)
    cosine = unit @ unit.T
    m = len(cosine)
    off_diagonal = cosine[~torch.eye(m, dtype=torch.bool, device=cosine.device)]
    return float(off_diagonal.mean()), float(off_diagonal.max())


@torch.no_grad()
def temporal_retrieval(
    embeddings: Tensor, episode: Tensor, *, apart: int = 3, window: int = 10
) -> tuple[float, float]:
    """Share of frames whose nearest neighbour is a near moment of the same episode, and that share
    by chance.

    Neighbours fewer than `apart` steps away in the same episode do not count at all, for their
    stacks share frames; those at most `window` steps away are what is looked for.

    Args:
        embeddings: [N, D], in the order of time within each episode.
        episode: [N], each episode's rows in one run.

    Returns:
        (share, chance); NaN where no frame has such a neighbour.
    """
    # cdist multiplies, and the rounding of long vectors is more than the distance of near ones.
    embeddings = embeddings - embeddings.mean(dim=0)
    return _retrieval(
        lambda rows: torch.cdist(embeddings[rows], embeddings), episode, apart, window
    )


@torch.no_grad()
def temporal_retrieval_of_gram(
    gram: Tensor, episode: Tensor, *, apart: int = 3, window: int = 10
) -> tuple[float, float]:
    """`temporal_retrieval` of embeddings of this `gram_matrix`, [N, N]."""
    squares = gram.diagonal()
    return _retrieval(lambda at: squares[at, None] + squares - 2 * gram[at], episode, apart, window)


def _retrieval(
    distances: Callable[[slice], Tensor], episode: Tensor, apart: int, window: int
) -> tuple[float, float]:
    """distances: of some rows from all, [rows, N], or what orders as they do."""
    n = len(episode)
    step = torch.arange(n, device=episode.device)
    found, chance, queries = 0, 0.0, 0
    for begin in range(0, n, _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        distance = distances(rows)
        same = episode[rows, None] == episode
        gap = (step[rows, None] - step).abs()
        overlaps = same & (gap < apart)
        wanted = same & (gap >= apart) & (gap <= window)
        has_any = wanted.any(dim=1)
        nearest = distance.masked_fill_(overlaps, torch.inf).argmin(dim=1, keepdim=True)
        found += int((wanted.gather(1, nearest)[:, 0] & has_any).sum())
        chance += float((wanted.sum(dim=1) / (~overlaps).sum(dim=1)).sum())
        queries += int(has_any.sum())
    return (found / queries, chance / queries) if queries else (math.nan, math.nan)
