"""What the features of one encoder know of the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from crpt.config import ProbeConfig
from crpt.encoder import Encoder, on_device
from crpt.measures import effective_rank, temporal_retrieval
from crpt.probe.ridge import held_out_accuracy, held_out_r2, varying
from crpt.replay import ReplayBuffer

BATCH = 256
# Of h, whose 39,200 dimensions would take a probe minutes, this many random projections are probed:
# they keep its distances and inner products.
SKETCH_DIM = 512

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
class Knowledge:
    """What one encoder's z and h know of some domains."""

    figures: dict[tuple[Features, str], Figures]
    """Of the features and a domain."""
    retrieval_by_chance: dict[str, float]
    """Of a domain; that of any features."""
    separability: dict[Features, float]
    """Held-out accuracy of a linear classifier that tells a frame's domain; empty: of one alone."""
    separability_by_chance: float
    z: dict[str, Tensor]
    """Its embeddings of every domain, [N, D]."""


def measure(
    config: ProbeConfig,
    dataset: ReplayBuffer,
    encoder: Encoder,
    domains: tuple[str, ...],
    *,
    frame_stack: int,
    device: str = "cpu",
    progress: bool = True,
    name: str = "probe",
) -> Knowledge:
    """What z = normalise(norm(g(h))) and h = f(obs) know, in these domains of the dataset.

    Raises:
        ValueError: no states were recorded, or such as say nothing.
    """
    # Sorted: the order in which they are asked for must not matter.
    names = sorted(set(domains))
    recorded = [_states(dataset, domain) for domain in names]
    embeddings: dict[str, Tensor] = {}
    figures: dict[tuple[Features, str], Figures] = {}
    by_chance: dict[str, float] = {}
    whole: dict[Features, list[Tensor]] = {features: [] for features in FEATURES}
    encoder, sketch = on_device(encoder.freeze(), device), _sketch(encoder.feature_dim, device)
    bar = tqdm(names, desc=name, unit=" domains", disable=not progress)
    for domain, (states, episode) in zip(bar, recorded, strict=True):
        z, h = _encode(encoder, dataset, domain, frame_stack, sketch)
        embeddings[domain] = z
        pairs: tuple[tuple[Features, Tensor], ...] = (("z", z), ("h", h))
        for features, x in pairs:
            retrieval, by_chance[domain] = temporal_retrieval(x, torch.from_numpy(episode))
            r2 = held_out_r2(x.double().numpy(), states, episode, config.folds)
            figures[features, domain] = Figures(float(np.nanmean(r2)), effective_rank(x), retrieval)
            whole[features].append(x)
    episodes = [episode for _, episode in recorded]
    counts = [len(episode) for episode in episodes]
    return Knowledge(
        figures=figures,
        retrieval_by_chance=by_chance,
        separability={
            features: _domains_told_apart(parts, episodes, config.folds)
            for features, parts in whole.items()
            if len(names) > 1
        },
        separability_by_chance=max(counts) / sum(counts),
        z=embeddings,
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


def _sketch(dimensions: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(dimensions, SKETCH_DIM, generator=generator) / SKETCH_DIM**0.5
    return sketch.to(device)


@torch.no_grad()
def _encode(
    encoder: Encoder, dataset: ReplayBuffer, domain: str, frame_stack: int, sketch: Tensor
) -> tuple[Tensor, Tensor]:
    """z [N, D] and h @ sketch [N, SKETCH_DIM] of all stored steps."""
    slots = np.concatenate(dataset.episodes(domain))
    z, h = [], []
    for i in range(0, len(slots), BATCH):
        batch = slots[i : i + BATCH]
        obs = dataset.observations(domain, batch, frame_stack=frame_stack, device=sketch.device)
        features = encoder(obs)
        z.append(encoder.embed_features(features).cpu())
        h.append((features @ sketch).cpu())
    return torch.cat(z), torch.cat(h)


def _domains_told_apart(
    features: list[Tensor], episodes: list[NDArray[np.int64]], folds: int
) -> float:
    label = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
    first = np.cumsum([0] + [e.max() + 1 for e in episodes[:-1]])
    episode = np.concatenate([e + begin for e, begin in zip(episodes, first, strict=True)])
    return held_out_accuracy(torch.cat(features).double().numpy(), label, episode, folds)
