"""What pre-training logs of a round: a line of figures for each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crpt.distributed import Team
from crpt.measures import (
    assignment_perplexity,
    effective_rank,
    prototype_spread,
    prototypes_in_use,
    usage_entropy,
)
from crpt.objectives import Losses
from crpt.pretrain.feeds import Domains
from crpt.pretrain.trainer import Trainer

Line = dict[str, float]


@dataclass(frozen=True)
class Turn:
    """An update of the round, and what it left of the whole batch."""

    domains: Domains
    losses: Losses
    gradient_norm: float | None
    """None for a batch that was measured only."""


def of_all(team: Team, losses: Losses) -> Losses:
    """The losses of the whole batch, from those of each process's share."""
    if team.group is None:
        return losses
    return replace(
        losses.of_rows(team.gather),
        total=team.mean(losses.total),
        parts={name: team.mean(part) for name, part in losses.parts.items()},
        distance=team.mean(losses.distance),
    )


def of_domain(trainer: Trainer, domains: Domains, losses: Losses, domain: str) -> Losses:
    """The losses of one domain's rows of a batch; what no row has of its own is as it was."""
    if losses.by_domain is None:
        return losses
    loss, trivial = losses.by_domain[trainer.domains.index(domain)]
    name = trainer.model.row_loss
    own = [slice(p.begin, p.end) for p in trainer.parts(domains) if p.domain == domain]

    def rows(x: Tensor) -> Tensor:
        return torch.cat([x[part] for part in own])

    return replace(
        losses.of_rows(rows),
        total=losses.total.detach() + (loss - losses.parts[name]),
        parts={**losses.parts, name: loss},
        distance=trainer.model.distance(loss, trivial),
    )


def distances(
    trainer: Trainer, updates: Sequence[Domains], losses: Sequence[Losses]
) -> dict[str, Tensor]:
    """From the trivial solution, of each domain that had a turn in these updates, the mean over its
    turns; in a team, of batches of one domain, this process's rows of them. Nothing is read: no
    waiting for a GPU."""
    found: dict[str, list[Tensor]] = {}
    for domains, loss in zip(updates, losses, strict=True):
        if loss.by_domain is None:
            found.setdefault(domains[0], []).append(loss.distance)
        else:
            of_each = trainer.model.distance(*loss.by_domain.unbind(dim=1))
            for domain, distance in zip(trainer.domains, of_each, strict=True):
                found.setdefault(domain, []).append(distance)
    return {
        domain: each[0] if len(each) == 1 else torch.stack(each).mean()
        for domain, each in found.items()
    }


def lines(trainer: Trainer, turns: Sequence[Turn]) -> dict[str, Line]:
    """The figures of each domain, means over its turns in the round that has just ended; of one
    without a turn in it, those of a batch that is measured for the purpose.

    In a team all processes call this, with the same turns.
    """
    spread = _spread(trainer)
    found = {}
    for domain in trainer.domains:
        own = [turn for turn in turns if domain in turn.domains]
        if not own:
            losses = of_all(trainer.team, trainer.measure(domain))
            own = [Turn((domain,), losses, gradient_norm=None)]
        measured = [_figures(of_domain(trainer, t.domains, t.losses, domain)) for t in own]
        line = _mean(measured) | trainer.ranks(domain) | spread
        norms = [{"gradient_norm": t.gradient_norm} for t in own if t.gradient_norm is not None]
        found[domain] = line | (_mean(norms) if norms else {})
    return found


def _figures(losses: Losses) -> Line:
    figures: Line = {"loss": losses.total.item(), "distance_from_trivial": losses.distance.item()}
    figures |= {name: part.item() for name, part in losses.parts.items()}
    figures["effective_rank"] = effective_rank(losses.z)
    if losses.scores is not None:
        figures["prototypes_in_use"] = prototypes_in_use(losses.scores)
        figures["usage_entropy"] = usage_entropy(losses.scores)
    if losses.codes is not None:
        figures["assignment_perplexity"] = assignment_perplexity(losses.codes)
    return figures


def _spread(trainer: Trainer) -> Line:
    model = trainer.model
    if not model.has_prototypes or len(model.prototypes) < 2:
        return {}
    mean, largest = prototype_spread(model.prototypes)
    return {"prototype_similarity_mean": mean, "prototype_similarity_max": largest}


def _mean(several: Sequence[Mapping[str, float]]) -> Line:
    """Of each figure; a single one stays as it is."""
    if len(several) == 1:
        return dict(several[0])
    return {key: sum(each[key] for each in several) / len(several) for key in several[0]}
