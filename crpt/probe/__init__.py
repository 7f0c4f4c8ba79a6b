"""What a frozen encoder knows of the simulator, beside what it knew at init (`python -m
crpt.probe`)."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

import crpt.ops
from crpt.config import ProbeConfig
from crpt.encoder import Encoder
from crpt.measures import prototypes_in_use
from crpt.probe.knowledge import FEATURES, Features, Figures, Knowledge, measure
from crpt.replay import ReplayBuffer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainProbe:
    """One domain's figures for z or h, beside those of the same encoder at init."""

    domain: str
    seen: bool
    features: Features
    init: Figures
    trained: Figures
    retrieval_by_chance: float
    prototypes_in_use: int
    """Prototypes that are some frame's first choice under the trained encoder."""

    @property
    def gain(self) -> float:
        return self.trained.r2 - self.init.r2


@dataclass(frozen=True)
class Separability:
    """Held-out accuracy of a linear classifier that tells a frame's domain from its features."""

    features: Features
    init: float
    trained: float
    by_chance: float


@dataclass(frozen=True)
class Probe:
    """What the probes found, and the embeddings that a figure is drawn from."""

    domains: list[DomainProbe]
    separability: list[Separability]
    z: dict[str, Tensor]
    """The trained encoder's embeddings of every domain, [N, D]."""
    prototypes: Tensor
    """[M, D]"""


def probe(
    config: ProbeConfig,
    dataset: ReplayBuffer,
    encoder: Encoder,
    initial: Encoder | Knowledge,
    *,
    seen: tuple[str, ...],
    domains: tuple[str, ...] = (),
    device: str = "cpu",
    progress: bool = True,
) -> Probe:
    """What z = normalise(norm(g(h))) and h = f(obs) know, in these domains of the dataset, or in
    all.

    `initial` is the same encoder at init, or what `measure` has found of it in these domains.

    Raises ValueError for a dataset that was drawn otherwise than what the encoder was trained on;
    warns of one that was played with another action repeat.
    """
    _check_play(dataset, encoder)
    names = sorted(domains or dataset.domains, key=lambda name: (name not in seen, name))

    def known_to(measured: Encoder, name: str) -> Knowledge:
        return measure(
            config,
            dataset,
            measured,
            tuple(names),
            frame_stack=encoder.frame_stack,  # the initial one has no metadata that tell it
            device=device,
            progress=progress,
            name=name,
        )

    if isinstance(initial, Knowledge):
        known = {domain for _, domain in initial.figures}
        if known != set(names):
            raise ValueError(
                f"initial should be what is known of {', '.join(sorted(names))}, got it of "
                f"{', '.join(sorted(known))}"
            )
    init = known_to(initial, "probe init") if isinstance(initial, Encoder) else initial
    trained = known_to(encoder, "probe trained")
    return Probe(
        domains=[
            DomainProbe(
                domain=name,
                seen=name in seen,
                features=features,
                init=init.figures[features, name],
                trained=trained.figures[features, name],
                retrieval_by_chance=trained.retrieval_by_chance[name],
                prototypes_in_use=_prototypes_in_use(encoder, trained.z[name], device),
            )
            for features in FEATURES
            for name in names
        ],
        separability=[
            Separability(
                features=features,
                init=init.separability[features],
                trained=accuracy,
                by_chance=trained.separability_by_chance,
            )
            for features, accuracy in trained.separability.items()
        ],
        z={name: trained.z[name] for name in names},
        prototypes=encoder.prototypes.cpu(),
    )


def to_json(result: Probe) -> dict[str, Any]:
    """None stands for what could not be measured, as JSON has no NaN."""
    return {
        "domains": [_without_nan(asdict(row)) | {"gain": row.gain} for row in result.domains],
        "separability": [asdict(row) for row in result.separability],
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_play(dataset: ReplayBuffer, encoder: Encoder) -> None:
    """ValueError where the dataset was drawn otherwise than what the encoder was trained on; a
    warning where it was played otherwise."""
    render, repeat = (
        (dataset.metadata.get(key), encoder.metadata.get(key))
        for key in ("render", "action_repeat")
    )
    if None not in render and render[0] != render[1]:
        raise ValueError(
            "dataset should be rendered as what the encoder was trained on, "
            f"{render[1]}, got {render[0]}"
        )
    size = encoder.config.image_size
    shapes = {domain: dataset.spec(domain).frame_shape for domain in dataset.domains}
    expected = (encoder.frame_channels, size, size)
    others = [f"{d} {list(shape)}" for d, shape in shapes.items() if shape != expected]
    if others:
        raise ValueError(
            f"frames of the dataset should be of {size}x{size}, {list(expected)}, as the encoder "
            "was trained on, got " + ", ".join(others)
        )
    if None not in repeat and repeat[0] != repeat[1]:
        _log.warning(
            "the frames to probe were played with action_repeat %s, those that the encoder was "
            "trained on with %s: what it sees moves otherwise",
            *repeat,
        )


def _prototypes_in_use(encoder: Encoder, z: Tensor, device: str) -> int:
    if len(encoder.prototypes) == 0:
        return 0
    return prototypes_in_use(crpt.ops.prototype_similarity(z.to(device), encoder.prototypes))
