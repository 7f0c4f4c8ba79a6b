"""Updates of pre-training: model, optimiser and sampler, and nothing about files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crpt.config import PretrainConfig
from crpt.distributed import ALONE, Team
from crpt.encoder import EncoderConfig, initial_encoder
from crpt.measures import (
    assignment_perplexity,
    effective_rank,
    prototype_spread,
    prototypes_in_use,
    usage_entropy,
)
from crpt.objectives import Losses, build
from crpt.objectives.crptpro import CRPTPro
from crpt.replay import ReplayBuffer

RANK_BATCH = 128


class Trainer:
    """One pre-training run, update by update."""

    def __init__(
        self,
        config: PretrainConfig,
        buffer: ReplayBuffer,
        *,
        seed: int,
        device: torch.device,
        team: Team = ALONE,
    ) -> None:
        self.team = team
        self.config = config
        self.buffer = buffer
        self.device = device
        self.round = 0
        # Sorted: the order in which processes added them to the dataset must not matter.
        self.domains = tuple(sorted(buffer.domains))
        channels, image_size = _frame_geometry(buffer, self.domains)
        _check_sizes(config, buffer, self.domains, team)
        encoder = initial_encoder(
            EncoderConfig(
                in_channels=channels * config.frame_stack,
                image_size=image_size,
                projection_dim=config.projection_dim,
                embedding_norm=config.embedding_norm,
            ),
            seed,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            model = build(encoder, config)
        self.dtype = encoder.projector.weight.dtype
        self.model = model.to(device, memory_format=torch.channels_last)
        self.model.join(team)
        self.forward: Callable[[Tensor, Tensor], Losses] = self.model
        if team.group is not None:
            self.forward = DistributedDataParallel(self.model, process_group=team.group)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate, fused=True)
        self.generator = torch.Generator().manual_seed(seed)

    def batches(self) -> list[tuple[str, ...]]:
        """The domains of each update of a round."""
        domains = self.domains
        if self.config.batches == "mixed":
            return [domains] * len(domains)
        return [(domain,) for domain in domains]

    def sample(self, domains: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """obs and next_obs, shifted, [B, K*C, H, W] in [0, 1], equal shares of the domains; of a
        team, this process's rows of them."""
        c = self.config
        parts = []
        for i, domain in enumerate(domains):
            share = c.batch_size * (i + 1) // len(domains) - c.batch_size * i // len(domains)
            parts.append(
                self.buffer.sample(
                    domain,
                    share,
                    frame_stack=c.frame_stack,
                    pad=c.shift_pad,
                    dtype=torch.bfloat16 if c.precision == "bf16" else self.dtype,
                    device=self.device,
                    generator=self.generator,
                )
            )
        obs, next_obs = (
            views[0] if len(views) == 1 else torch.cat(views)
            for views in ([p.obs for p in parts], [p.next_obs for p in parts])
        )
        mine = self.team.share(c.batch_size)
        return (
            obs[mine].contiguous(memory_format=torch.channels_last),
            next_obs[mine].contiguous(memory_format=torch.channels_last),
        )

    def update(self, domains: tuple[str, ...]) -> Losses:
        return self.step(*self.sample(domains))

    def step(
        self, obs: Tensor, next_obs: Tensor, passed: Callable[[str], None] = lambda phase: None
    ) -> Losses:
        """The update on these views; `passed` is told of every phase when it is over."""
        self.model.before_update()
        losses = self.forward(obs, next_obs)
        passed("forward")
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        passed("backward")
        self.optimizer.step()
        self.model.after_update()
        passed("finish")
        return losses

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Length of the last update's gradient."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def ranks(self, domains: tuple[str, ...]) -> dict[str, float]:
        """Effective rank of h and of the z that would be exported now, of a batch that training
        does not miss."""
        generator = torch.Generator().manual_seed(self.round)
        share = min(self.config.batch_size, RANK_BATCH) // len(domains)
        obs = torch.cat(
            [
                self.buffer.sample(
                    domain, max(share, 2), frame_stack=self.config.frame_stack, pad=0,
                    generator=generator,
                ).obs
                for domain in domains
            ]
        ).to(self.device)  # fmt: skip
        encoder = self.model.online.eval()
        h = encoder(obs)
        z = encoder.embed_features(h)
        encoder.train()
        return {
            "effective_rank_h": effective_rank(h),
            "effective_rank_exported": effective_rank(z),
        }

    def is_finite(self) -> bool:
        """Whether every weight, running statistic and moment of Adam is a finite number."""
        moments = [m for state in self.optimizer.state.values() for m in state.values()]
        tensors = [*self.model.state_dict().values(), *moments]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def state(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.round = state["round"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def of_all(team: Team, losses: Losses) -> Losses:
    """The losses of the whole batch, from those of each process's share."""
    if team.group is None:
        return losses
    return Losses(
        total=team.mean(losses.total),
        parts={name: team.mean(part) for name, part in losses.parts.items()},
        distance=team.mean(losses.distance),
        z=team.gather(losses.z),
        codes=None if losses.codes is None else team.gather(losses.codes),
    )


def figures(trainer: Trainer, domains: tuple[str, ...], loss: Losses) -> dict[str, float]:
    """What the log says of one update."""
    figures = {"loss": loss.total.item(), "distance_from_trivial": loss.distance.item()}
    figures |= {name: part.item() for name, part in loss.parts.items()}
    figures["effective_rank"] = effective_rank(loss.z)
    figures |= trainer.ranks(domains)
    if loss.codes is not None:
        figures["prototypes_in_use"] = prototypes_in_use(loss.codes)
        figures["assignment_perplexity"] = assignment_perplexity(loss.codes)
        figures["usage_entropy"] = usage_entropy(loss.codes)
    if isinstance(trainer.model, CRPTPro) and trainer.config.prototypes > 1:
        mean, largest = prototype_spread(trainer.model.prototypes)
        figures |= {"prototype_similarity_mean": mean, "prototype_similarity_max": largest}
    return figures


def _frame_geometry(buffer: ReplayBuffer, domains: tuple[str, ...]) -> tuple[int, int]:
    """Channels and size of the square frames that all domains share."""
    if not domains:
        raise ValueError("buffer should hold at least one domain, got none")
    shapes = {domain: buffer.spec(domain).frame_shape for domain in domains}
    channels, height, width = shapes[domains[0]]
    if height != width or len(set(shapes.values())) > 1:
        got = ", ".join(f"{domain} {list(shape)}" for domain, shape in shapes.items())
        raise ValueError(f"frames of all domains should be of one shape [C, S, S], got {got}")
    return channels, height


def _check_sizes(
    config: PretrainConfig, buffer: ReplayBuffer, domains: tuple[str, ...], team: Team
) -> None:
    least = config.frame_stack
    found = {d: len(buffer.indices(d, frame_stack=config.frame_stack)) for d in domains}
    short = ", ".join(f"{domain} {n}" for domain, n in found.items() if n < least)
    if short:
        raise ValueError(
            f"every domain should have at least {least} transitions, as many as an observation "
            f"has frames, got {short}; record more of it, or leave it out of the dataset"
        )
    if config.batch_size % team.size:
        raise ValueError(
            f"batch_size should be a multiple of the {team.size} processes, got {config.batch_size}"
        )
    if config.batches == "mixed" and config.batch_size < len(domains):
        raise ValueError(
            f"batch_size should be at least the number of domains, {len(domains)}, with batches "
            f"mixed, got {config.batch_size}"
        )
