"""What a frozen encoder knows of the simulator, beside what it knew at init (`python -m
crpt.probe`)."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import crpt.ops
from crpt.config import ProbeConfig
from crpt.encoder import Encoder, on_device
from crpt.measures import effective_rank, prototypes_in_use, temporal_retrieval
from crpt.probe.ridge import held_out_accuracy, held_out_r2, varying
from crpt.replay import ReplayBuffer

BATCH = 256
# Of h, whose 39,200 dimensions would take a probe minutes, this many random projections are probed:
# they keep its distances and inner products.
SKETCH_DIM = 512

_log = logging.getLogger(__name__)

Features = Literal["z", "h"]
FEATURES: tuple[Features, ...] = ("z", "h")


@dataclass(frozen=True)
class Figures:
    """What features know of one domain."""

    r2: float
    """Mean over the state's dimensions of the held-out R2 of a ridge probe."""
    effective_rank: float
    retrieval: float
    """Share of frames whose nearest neighbour is a near moment of the same episode."""


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
class Encoded:
    """One encoder's features of all frames of all domains."""

    z: list[Tensor]  # a [N, D] for every domain
    h: list[Tensor]  # a [N, SKETCH_DIM] for every domain


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
    initial: Encoder,
    *,
    seen: tuple[str, ...],
    domains: tuple[str, ...] = (),
    device: str = "cpu",
    progress: bool = True,
) -> Probe:
    """What z = normalise(norm(g(h))) and h = f(obs) know, in these domains of the dataset, or in
    all.

    Raises ValueError for a dataset that was drawn otherwise than what the encoder was trained on;
    warns of one that was played with another action repeat.
    """
    _check_play(dataset, encoder)
    # Sorted: the order in which processes added them to the dataset must not matter.
    names = sorted(domains or dataset.domains, key=lambda name: (name not in seen, name))
    states, episodes = zip(*(_states(dataset, name) for name in names), strict=True)
    bar = tqdm(total=2 * len(names), desc="probe", unit=" encodings", disable=not progress)
    with bar:
        stack = encoder.frame_stack  # the initial one has no metadata that tell it
        init = _encode_all(initial, dataset, names, stack, device, bar)
        trained = _encode_all(encoder, dataset, names, stack, device, bar)
    rows = []
    for features in FEATURES:
        for i, name in enumerate(names):
            before, after = (getattr(e, features)[i] for e in (init, trained))
            figures_before, _ = _figures(before, states[i], episodes[i], config.folds)
            figures_after, by_chance = _figures(after, states[i], episodes[i], config.folds)
            rows.append(
                DomainProbe(
                    domain=name,
                    seen=name in seen,
                    features=features,
                    init=figures_before,
                    trained=figures_after,
                    retrieval_by_chance=by_chance,
                    prototypes_in_use=_prototypes_in_use(encoder, trained.z[i], device),
                )
            )
    return Probe(
        domains=rows,
        separability=_separability(init, trained, episodes, config.folds),
        z=dict(zip(names, trained.z, strict=True)),
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


def _states(dataset: ReplayBuffer, domain: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The states [N, K] of all stored steps, and the episode [N] of each."""
    episodes = dataset.episodes(domain)
    slots = np.concatenate(episodes)
    states = np.asarray(dataset.arrays(domain)["states"][slots])
    if states.shape[1] == 0:
        raise ValueError(f"{domain} should have been recorded with simulator states, got none")
    unfit = int((~np.isfinite(states)).any(axis=1).sum())
    if unfit:
        raise ValueError(f"states of {domain} should be finite, got {unfit} steps that are not")
    if not varying(states).any():
        raise ValueError(
            f"states of {domain} should vary, for a probe to have something to read, got one state "
            f"in all {len(states)} steps"
        )
    number = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
    return states, number


@torch.no_grad()
def _encode_all(
    encoder: Encoder,
    dataset: ReplayBuffer,
    names: list[str],
    stack: int,
    device: str,
    bar: tqdm[Any],
) -> Encoded:
    encoder = on_device(encoder.freeze(), device)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(encoder.feature_dim, SKETCH_DIM, generator=generator) / SKETCH_DIM**0.5
    sketch = sketch.to(device)
    encoded = Encoded([], [])
    for name in names:
        slots = np.concatenate(dataset.episodes(name))
        z, h = [], []
        for i in range(0, len(slots), BATCH):
            batch = slots[i : i + BATCH]
            obs = dataset.observations(name, batch, frame_stack=stack, device=device)
            features = encoder(obs)
            z.append(encoder.embed_features(features).cpu())
            h.append((features @ sketch).cpu())
        encoded.z.append(torch.cat(z))
        encoded.h.append(torch.cat(h))
        bar.update()
    return encoded


def _figures(
    x: Tensor, states: NDArray[np.float64], episode: NDArray[np.int64], folds: int
) -> tuple[Figures, float]:
    """And the retrieval by chance, which is that of any features."""
    r2 = held_out_r2(x.double().numpy(), states, episode, folds)
    retrieval, by_chance = temporal_retrieval(x, torch.from_numpy(episode))
    return Figures(float(np.nanmean(r2)), effective_rank(x), retrieval), by_chance


def _separability(
    init: Encoded, trained: Encoded, episodes: tuple[NDArray[np.int64], ...], folds: int
) -> list[Separability]:
    """Of all domains from each other; nothing where there is only one."""
    if len(episodes) < 2:
        return []
    counts = [len(e) for e in episodes]
    label = np.repeat(np.arange(len(episodes)), counts)
    first = np.cumsum([0] + [e.max() + 1 for e in episodes[:-1]])
    episode = np.concatenate([e + begin for e, begin in zip(episodes, first, strict=True)])

    def accuracy(parts: list[Tensor]) -> float:
        return held_out_accuracy(torch.cat(parts).double().numpy(), label, episode, folds)

    return [
        Separability(
            features=features,
            init=accuracy(getattr(init, features)),
            trained=accuracy(getattr(trained, features)),
            by_chance=max(counts) / sum(counts),
        )
        for features in FEATURES
    ]


def _prototypes_in_use(encoder: Encoder, z: Tensor, device: str) -> int:
    if len(encoder.prototypes) == 0:
        return 0
    return prototypes_in_use(crpt.ops.prototype_similarity(z.to(device), encoder.prototypes))
