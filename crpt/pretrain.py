"""Pre-training: from random play to a frozen encoder (`python -m crpt.pretrain`)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from crpt.config import PretrainConfig
from crpt.encoder import Encoder, EncoderConfig, has_encoder, initial_encoder
from crpt.interrupt import Interrupted, StopRequest
from crpt.measures import assignment_perplexity, effective_rank, prototypes_in_use
from crpt.objectives import CRPTPro
from crpt.objectives.crptpro import Losses
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory

STAGE = "pretrain"
# Below this distance from log M the codes are uniform and the encoder learns next to nothing.
PLATEAU_DISTANCE = 0.01
PLATEAU_ROUNDS = 200


class PlateauWarning(UserWarning):
    """The comparison loss sits at its trivial solution."""


class DivergenceError(RuntimeError):
    """The loss is not a finite number."""


class Trainer:
    """Model, optimiser and sampler of one pre-training run, and nothing about files."""

    def __init__(
        self, config: PretrainConfig, buffer: ReplayBuffer, *, seed: int, device: torch.device
    ) -> None:
        self.config = config
        self.buffer = buffer
        self.device = device
        self.round = 0
        # Sorted: the order in which processes added them to the dataset must not matter.
        self.domains = tuple(sorted(buffer.domains))
        encoder = initial_encoder(
            EncoderConfig(
                in_channels=3 * config.frame_stack,
                image_size=buffer.metadata["image_size"],
                projection_dim=config.projection_dim,
                embedding_norm=config.embedding_norm,
            ),
            seed,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            model = CRPTPro(encoder, config)
        self.model = model.to(device, memory_format=torch.channels_last)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
        self.generator = torch.Generator().manual_seed(seed)

    def batches(self) -> list[tuple[str, ...]]:
        """The domains of each update of a round."""
        domains = self.domains
        if self.config.batches == "mixed":
            return [domains] * len(domains)
        return [(domain,) for domain in domains]

    def sample(self, domains: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """obs and next_obs, shifted, [B, 3K, H, W] in [0, 1], equal shares of the domains."""
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
                    dtype=torch.bfloat16 if c.precision == "bf16" else torch.float32,
                    device=self.device,
                    generator=self.generator,
                )
            )
        obs, next_obs = (
            views[0] if len(views) == 1 else torch.cat(views)
            for views in ([p.obs for p in parts], [p.next_obs for p in parts])
        )
        return (
            obs.contiguous(memory_format=torch.channels_last),
            next_obs.contiguous(memory_format=torch.channels_last),
        )

    def update(self, domains: tuple[str, ...]) -> Losses:
        obs, next_obs = self.sample(domains)
        self.model.project_prototypes()
        losses: Losses = self.model(obs, next_obs)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.optimizer.step()
        self.model.update_target()
        return losses

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


def pretrain(
    config: PretrainConfig,
    buffer: ReplayBuffer,
    run: RunDirectory,
    *,
    seed: int,
    device: str = "cpu",
    progress: bool = True,
) -> Encoder:
    """Train on the buffer's domains for `config.rounds` rounds, from the last checkpoint on; write
    `encoder/`.

    Returns the frozen encoder. Raises DivergenceError when the loss is not finite (the last
    checkpoint is kept) and Interrupted on Ctrl-C (after a checkpoint).
    """
    saved = run.load_checkpoint(STAGE)
    if saved is not None and saved["round"] == config.rounds and has_encoder(run.encoder_dir):
        return Encoder.from_pretrained(run.encoder_dir)
    trainer = Trainer(config, buffer, seed=seed, device=torch.device(device))
    if saved is not None:
        trainer.load_state(saved)
    run.rewind_metrics(STAGE, trainer.round)
    updates = trainer.batches()
    bar = tqdm(
        total=config.rounds * len(updates), initial=trainer.round * len(updates),
        desc="pretrain", unit="update", disable=not progress,
    )  # fmt: skip
    with StopRequest() as stop, bar:
        while trainer.round < config.rounds:
            losses = []
            for domains in updates:
                losses.append(trainer.update(domains))
                bar.update()
            trainer.round += 1
            last = trainer.round == config.rounds
            if trainer.round % config.log_every == 0 or last:
                _log(run, trainer, ["+".join(domains) for domains in updates], losses, bar)
            if trainer.round % config.checkpoint_every == 0 or last or stop.requested:
                _check_finite(trainer, losses)
                run.save_checkpoint(STAGE, trainer.state())
            if stop.requested and not last:
                raise Interrupted(
                    f"pretrain stopped after round {trainer.round} of {config.rounds}"
                )
    encoder = trainer.model.export()
    encoder.save_pretrained(
        run.encoder_dir,
        metadata={
            "domains": list(trainer.domains),
            "objective": "crptpro",
            "rounds": config.rounds,
            "batch_size": config.batch_size,
            "seed": seed,
            "render": buffer.metadata["render"],
            "action_repeat": buffer.metadata["action_repeat"],
        },
    )
    return encoder.freeze()


def _check_finite(trainer: Trainer, losses: list[Losses]) -> None:
    if not all(math.isfinite(loss.total.item()) for loss in losses):
        raise DivergenceError(
            f"the loss should be finite, got {[loss.total.item() for loss in losses]} in round "
            f"{trainer.round}; "
            "the last checkpoint is kept. Try a lower learning_rate, or precision fp32."
        )


def _log(
    run: RunDirectory, trainer: Trainer, names: list[str], losses: list[Losses], bar: tqdm[Any]
) -> None:
    """One line per batch of the round, and a warning on the plateau."""
    _check_finite(trainer, losses)
    log_m = math.log(trainer.config.prototypes)
    distances = []
    for name, loss in zip(names, losses, strict=True):
        distances.append(log_m - loss.comparison.item())
        run.log(
            STAGE,
            trainer.round,
            domain=name,
            loss=loss.total.item(),
            comparison_loss=loss.comparison.item(),
            intrinsic_loss=loss.intrinsic.item(),
            distance_from_trivial=distances[-1],
            prototypes_in_use=prototypes_in_use(loss.codes),
            assignment_perplexity=assignment_perplexity(loss.codes),
            effective_rank=effective_rank(loss.target),
        )
    bar.set_postfix(distance=f"{sum(distances) / len(distances):.3f}")
    if trainer.round >= PLATEAU_ROUNDS and max(distances) < PLATEAU_DISTANCE:
        warnings.warn(
            f"after {trainer.round} rounds the comparison loss is within {PLATEAU_DISTANCE} of "
            f"log M = {log_m:.3f}, its "
            "trivial solution: the codes are uniform and the encoder learns next to nothing. "
            "Standardise the "
            "embeddings: --embedding-norm batch",
            PlateauWarning,
            stacklevel=2,
        )


if __name__ == "__main__":
    from crpt.commands import run

    run("pretrain")
