"""What the features of one encoder know of the simulator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from crpt.config import ProbeConfig
from crpt.encoder import Encoder, on_device
from crpt.measures import (
    effective_rank,
    effective_rank_of_gram,
    gram_matrix,
    temporal_retrieval,
    temporal_retrieval_of_gram,
)
from crpt.probe.ridge import OF_EMBEDDINGS, OF_GRAM, Ridge, held_out_accuracy, held_out_r2, varying
from crpt.replay import ReplayBuffer

BATCH = 256
# Of all domains together, by whose h they are told apart: the inner products of all frames would
# take minutes, and gigabytes.
SOME_FRAMES = 1_000

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
    """Held-out accuracy of a linear classifier that tells a frame's domain, of h by SOME_FRAMES;
    empty: of one alone."""
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
    episodes = [episode for _, episode in recorded]
    counts = [len(episode) for episode in episodes]
    every = math.ceil(sum(counts) / SOME_FRAMES)  # one frame in so many
    embeddings: dict[str, Tensor] = {}
    figures: dict[tuple[Features, str], Figures] = {}
    by_chance: dict[str, float] = {}
    some_h: list[Tensor] = []
    encoder = on_device(encoder.freeze(), device)
    bar = tqdm(names, desc=name, unit=" domains", disable=not progress)
    for domain, (states, episode) in zip(bar, recorded, strict=True):
        z, h = _encode(encoder, dataset, domain, frame_stack, device)
        embeddings[domain] = z
        some_h.append(h[::every].clone())
        gram = gram_matrix(h).cpu()
        del h  # before that of the next domain is made
        figures["z", domain], by_chance[domain] = _of_embeddings(z, states, episode, config.folds)
        figures["h", domain] = _of_gram(gram, states, episode, config.folds)
    return Knowledge(
        figures=figures,
        retrieval_by_chance=by_chance,
        separability=_separability([*embeddings.values()], some_h, episodes, every, config.folds),
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


@torch.no_grad()
def _encode(
    encoder: Encoder, dataset: ReplayBuffer, domain: str, frame_stack: int, device: str
) -> tuple[Tensor, Tensor]:
    """z [N, D] and, on the device, h [N, feature_dim] of all stored steps."""
    slots = np.concatenate(dataset.episodes(domain))
    z = []
    h = torch.empty(len(slots), encoder.feature_dim, device=device)
    for i in range(0, len(slots), BATCH):
        batch = slots[i : i + BATCH]
        obs = dataset.observations(domain, batch, frame_stack=frame_stack, device=h.device)
        features = h[i : i + BATCH] = encoder(obs)
        z.append(encoder.embed_features(features).cpu())
    return torch.cat(z), h


def _of_embeddings(
    z: Tensor, states: NDArray[np.float64], episode: NDArray[np.int64], folds: int
) -> tuple[Figures, float]:
    """The figures of z [N, D], and what chance would retrieve."""
    r2 = held_out_r2(z.double().numpy(), states, episode, folds, OF_EMBEDDINGS)
    retrieval, by_chance = temporal_retrieval(z, torch.from_numpy(episode))
    return Figures(float(np.nanmean(r2)), effective_rank(z), retrieval), by_chance


def _of_gram(
    gram: Tensor, states: NDArray[np.float64], episode: NDArray[np.int64], folds: int
) -> Figures:
    """The figures of embeddings of these inner products, [N, N]."""
    r2 = held_out_r2(gram.numpy(), states, episode, folds, OF_GRAM)
    retrieval, _ = temporal_retrieval_of_gram(gram, torch.from_numpy(episode))
    return Figures(float(np.nanmean(r2)), effective_rank_of_gram(gram), retrieval)


def _separability(
    z: list[Tensor],
    some_h: list[Tensor],
    episodes: list[NDArray[np.int64]],
    every: int,
    folds: int,
) -> dict[Features, float]:
    """By z of all frames, and by h of one frame in `every`; empty: of one domain alone."""
    if len(episodes) < 2:
        return {}
    of_some = [episode[::every] for episode in episodes]
    gram = gram_matrix(torch.cat(some_h))
    return {
        "z": _domains_told_apart(torch.cat(z).double(), episodes, folds, OF_EMBEDDINGS),
        "h": _domains_told_apart(gram, of_some, folds, OF_GRAM),
    }


def _domains_told_apart(
    x: Tensor, episodes: list[NDArray[np.int64]], folds: int, ridge: Ridge
) -> float:
    label = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
    first = np.cumsum([0] + [e.max() + 1 for e in episodes[:-1]])
    episode = np.concatenate([e + begin for e, begin in zip(episodes, first, strict=True)])
    return held_out_accuracy(x.cpu().numpy(), label, episode, folds, ridge)
