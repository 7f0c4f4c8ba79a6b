"""What a frozen encoder knows of the simulator, beside what it knew at init (`python -m
crpt.probe`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import crpt.ops
from crpt.config import ProbeConfig
from crpt.encoder import Encoder
from crpt.measures import effective_rank, prototypes_in_use
from crpt.replay import ReplayBuffer
from crpt.ridge import held_out_r2

BATCH = 256


@dataclass(frozen=True)
class DomainProbe:
    """One domain's figures."""

    domain: str
    seen: bool
    r2_init: float
    """Mean over the state's dimensions of the held-out R2 of z at init."""
    r2: float
    """The same of the trained encoder."""
    effective_rank_init: float
    effective_rank: float
    prototypes_in_use: int
    """Prototypes that are some frame's first choice under the trained encoder."""

    @property
    def gain(self) -> float:
        return self.r2 - self.r2_init


def probe(
    config: ProbeConfig,
    dataset: ReplayBuffer,
    encoder: Encoder,
    initial: Encoder,
    *,
    seen: tuple[str, ...],
    device: str = "cpu",
    progress: bool = True,
) -> list[DomainProbe]:
    """Ridge probes of the simulator's state from z, split by episode, for every domain there is.

    Raises ValueError for a dataset that was drawn otherwise than what the encoder was trained on.
    """
    _check_render(dataset, encoder)
    results = []
    # Sorted: the order in which processes added them to the dataset must not matter.
    domains = sorted(dataset.domains)
    bar = tqdm(total=2 * len(domains), desc="probe", unit=" encodings", disable=not progress)
    for domain in domains:
        states, episode = _states(dataset, domain)
        z_init = _embed(initial, dataset, domain, device)
        bar.update()
        z = _embed(encoder, dataset, domain, device)
        bar.update()
        results.append(
            DomainProbe(
                domain=domain,
                seen=domain in seen,
                r2_init=_mean_r2(z_init, states, episode, config.folds),
                r2=_mean_r2(z, states, episode, config.folds),
                effective_rank_init=effective_rank(z_init),
                effective_rank=effective_rank(z),
                prototypes_in_use=_prototypes_in_use(encoder, z, device),
            )
        )
    bar.close()
    return sorted(results, key=lambda result: not result.seen)


def to_json(results: list[DomainProbe]) -> list[dict[str, Any]]:
    return [asdict(r) | {"gain": r.gain} for r in results]


def _check_render(dataset: ReplayBuffer, encoder: Encoder) -> None:
    drawn, learned = dataset.metadata.get("render"), encoder.metadata.get("render")
    if None not in (drawn, learned) and drawn != learned:
        raise ValueError(
            f"dataset should be rendered as what the encoder was trained on, {learned}, got {drawn}"
        )


def _states(dataset: ReplayBuffer, domain: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The states [N, K] of all stored steps, and the episode [N] of each."""
    episodes = dataset.episodes(domain)
    slots = np.concatenate(episodes)
    states = np.asarray(dataset.arrays(domain)["states"][slots])
    if states.shape[1] == 0:
        raise ValueError(f"{domain} should have been recorded with simulator states, got none")
    number = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
    return states, number


@torch.no_grad()
def _embed(encoder: Encoder, dataset: ReplayBuffer, domain: str, device: str) -> torch.Tensor:
    """z of all stored steps, [N, D], on the CPU."""
    encoder = encoder.freeze().to(device, memory_format=torch.channels_last)
    slots = np.concatenate(dataset.episodes(domain))
    stack = encoder.config.in_channels // 3
    parts = []
    for i in range(0, len(slots), BATCH):
        obs = dataset.observations(domain, slots[i : i + BATCH], frame_stack=stack, device=device)
        parts.append(encoder.embed(obs).cpu())
    return torch.cat(parts)


def _mean_r2(
    z: torch.Tensor, states: NDArray[np.float64], episode: NDArray[np.int64], folds: int
) -> float:
    return float(np.nanmean(held_out_r2(z.double().numpy(), states, episode, folds)))


def _prototypes_in_use(encoder: Encoder, z: torch.Tensor, device: str) -> int:
    if len(encoder.prototypes) == 0:
        return 0
    return prototypes_in_use(crpt.ops.prototype_similarity(z.to(device), encoder.prototypes))


if __name__ == "__main__":
    from crpt.commands import run

    run("probe")
