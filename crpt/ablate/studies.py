"""The method's open questions: each a list of variants of a preset, trained and probed alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

from crpt.ablate.pictures import Draw, alone_and_together, bars, curves_over, gains_over_domains
from crpt.config import PRESETS, EncoderStages, Objective, PretrainConfig

ALPHAS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

# One component at a time; what a preset has already is left out.
COMPONENTS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("embedding_norm", ("none", "batch")),
    ("batches", ("alternate", "mixed")),
    ("schedule", ("constant", "cosine")),
    ("temperature", (0.05, 0.1, 0.2)),
    ("sinkhorn_iterations", (1, 3, 10)),
    ("projection_dim", (64, 128, 256)),
    ("prototypes", (128, 512, 2048)),
    ("target_rate", (0.01, 0.05, 1.0)),
    ("shift_pad", (0, 4, 8)),
    ("intrinsic", ("dot", "knn", "none")),
)
RATES = (1 / 3, 3.0)  # times the preset's learning rate
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True)
class Variant:
    """A setting that is trained and probed."""

    name: str
    config: PretrainConfig
    transitions: int
    """Of random play, per domain."""
    x: float | None = None
    """Its place on the figure's axis."""


@dataclass(frozen=True)
class Study:
    """A question."""

    asks: str
    draw: Draw
    variants: Callable[[EncoderStages], list[Variant]]


def alpha(stages: EncoderStages) -> list[Variant]:
    config = replace(stages.pretrain, objective="crptpro", intrinsic="dot")
    return [
        Variant(f"alpha_{a:g}", replace(config, intrinsic_weight=a), _transitions(stages), a)
        for a in ALPHAS
    ]


def transitions(stages: EncoderStages) -> list[Variant]:
    least = stages.pretrain.frame_stack
    counts = [max(least, round(_transitions(stages) * share)) for share in SHARES]
    return [Variant(f"transitions_{n}", stages.pretrain, n, n) for n in dict.fromkeys(counts)]


def domains(stages: EncoderStages) -> list[Variant]:
    names = tuple(dict.fromkeys(_turns(stages)))
    return [
        Variant(f"domains_{n}", _trained_on(stages, names[:n]), _transitions(stages), n)
        for n in range(1, len(names) + 1)
    ]


def single(stages: EncoderStages) -> list[Variant]:
    names = tuple(dict.fromkeys(_turns(stages)))
    if len(names) < 2:
        raise ValueError(f"domains should be at least 2 for single, got {' '.join(names)}")
    alone = [Variant(n, _trained_on(stages, (n,)), _transitions(stages)) for n in names]
    return [*alone, Variant("all_domains", _trained_on(stages, names), _transitions(stages))]


def components(stages: EncoderStages) -> list[Variant]:
    base, found = stages.pretrain, {"as_it_is": stages.pretrain}
    for field, values in COMPONENTS:
        for value in values:
            if value != getattr(base, field):
                found[f"{field}_{value}"] = replace(base, **{field: value})
    for factor in RATES:
        rate = float(f"{base.learning_rate * factor:.1g}")
        found[f"learning_rate_{rate:g}"] = replace(base, learning_rate=rate)
    found["paper"] = replace(
        PRESETS["paper"].pretrain,
        rounds=base.rounds,
        batch_size=base.batch_size,
        domains=base.domains,
        weights=base.weights,
        precision=base.precision,
        log_every=base.log_every,
        checkpoint_every=base.checkpoint_every,
    )
    found |= {n: c for n, c in _objectives(base).items() if c.objective != base.objective}
    return [Variant(name, config, _transitions(stages)) for name, config in found.items()]


def objectives(stages: EncoderStages) -> list[Variant]:
    found = _objectives(stages.pretrain)
    return [Variant(name, config, _transitions(stages)) for name, config in found.items()]


def _objectives(base: PretrainConfig) -> dict[str, PretrainConfig]:
    found = {name: replace(base, objective=name) for name in OBJECTIVES}
    # Proto-RL's representation loss.
    return found | {"proto_rl": replace(base, objective="crptpro", intrinsic="none")}


def _transitions(stages: EncoderStages) -> int:
    return stages.collect.transitions


def _turns(stages: EncoderStages) -> tuple[str, ...]:
    """The domains of a round's updates."""
    return stages.pretrain.domains or stages.collect.domains


def _trained_on(stages: EncoderStages, names: tuple[str, ...]) -> PretrainConfig:
    """As many updates as all domains together get; of one that is named twice, by both weights."""
    base, turns = stages.pretrain, _turns(stages)
    rounds = round(base.rounds * len(turns) / len(names))
    weights: dict[str, float] = {}
    if base.weights:
        for name, weight in zip(turns, base.weights, strict=True):
            weights[name] = weights.get(name, 0) + weight
    own = tuple(weights[name] for name in names if name in weights)
    return replace(base, domains=names, weights=own, rounds=rounds)


STUDIES: dict[str, Study] = {
    "alpha": Study(
        "coverage and probes against the intrinsic weight", curves_over("intrinsic weight"), alpha
    ),
    "transitions": Study(
        "probes against the random transitions of each domain",
        curves_over("transitions"),
        transitions,
    ),
    "domains": Study(
        "probes against the number of domains, as many updates", gains_over_domains, domains
    ),
    "single": Study(
        "one domain alone against all together, as many updates", alone_and_together, single
    ),
    "components": Study("one component at a time, and other objectives", bars, components),
    "objectives": Study("objectives under the same data and budget", bars, objectives),
}
