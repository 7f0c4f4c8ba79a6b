"""What a study checks before its first training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from crpt.ablate.studies import Variant
from crpt.config import EncoderStages
from crpt.pretrain.inputs import check_counts
from crpt.replay import ReplayBuffer


def asked_of(stages: EncoderStages, dataset: ReplayBuffer) -> EncoderStages:
    """The stages on random play that was recorded elsewhere: of its domains, those that are asked
    for are trained on, and no others.

    Raises ValueError for play that is not what `collect` asks for: the probes' own play is recorded
    as `collect` says, of its domains and as they look there.
    """
    asked: dict[str, Any] = {}
    if missing := set(stages.collect.domains) - set(dataset.domains):
        asked["domains"] = " ".join(sorted(dataset.domains))
    for name, held in _how_recorded(dataset).items():
        if held is not None and held != getattr(stages.collect, name):
            asked[name.replace("_", "-")] = held
    if asked:
        lacks = f"lacks {', '.join(sorted(missing))} and " if missing else ""
        flags = " ".join(f"--collect.{name} {value}" for name, value in asked.items())
        raise ValueError(
            f"dataset should be play as collect asks for, got {dataset.path}, which {lacks}"
            f"is asked for by {flags}"
        )
    if stages.pretrain.domains or set(dataset.domains) == set(stages.collect.domains):
        return stages
    return replace(stages, pretrain=replace(stages.pretrain, domains=stages.collect.domains))


def check_variants(
    variants: Sequence[Variant], stages: EncoderStages, dataset: ReplayBuffer | None
) -> None:
    """ValueError unless each can be trained on its random play: the dataset, or what is about to be
    recorded."""
    for variant in variants:
        names = tuple(dict.fromkeys(variant.config.domains or stages.collect.domains))
        if others := [name for name in names if name not in stages.collect.domains]:
            raise ValueError(
                "pretrain.domains should be some of collect.domains, "
                f"{', '.join(stages.collect.domains)}, got {', '.join(others)}"
            )
        stack = variant.config.frame_stack
        held = {
            name: variant.transitions
            if dataset is None
            else len(dataset.indices(name, frame_stack=stack))
            for name in names
        }
        try:
            check_counts(variant.config, held)
        except ValueError as error:
            raise ValueError(f"{variant.name} cannot be trained: {error}") from error


def _how_recorded(dataset: ReplayBuffer) -> dict[str, Any]:
    """Fields of `collect`; None for what a dataset not made by crpt.collect leaves open."""
    sizes = {dataset.spec(domain).frame_shape[-1] for domain in dataset.domains}
    return {
        "render": dataset.metadata.get("render"),
        "action_repeat": dataset.metadata.get("action_repeat"),
        "image_size": sizes.pop() if len(sizes) == 1 else None,
    }
