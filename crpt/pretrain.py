"""Pre-training: from random play to a frozen encoder (`python -m crpt.pretrain`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from crpt.config import PretrainConfig
from crpt.encoder import Encoder, EncoderConfig, has_encoder, initial_encoder
from crpt.interrupt import Interrupted, StopRequest
from crpt.measures import (
    assignment_perplexity,
    effective_rank,
    prototype_spread,
    prototypes_in_use,
    usage_entropy,
)
from crpt.model_card import write_card
from crpt.objectives import Losses, build
from crpt.objectives.crptpro import CRPTPro
from crpt.plateau import Plateau
from crpt.replay import ReplayBuffer
from crpt.run_directory import CheckpointError, RunDirectory

STAGE = "pretrain"
RANK_BATCH = 128


class DivergenceError(RuntimeError):
    """The loss or a weight is not a finite number."""


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
        channels, image_size = _frame_geometry(buffer, self.domains)
        _check_transitions(config, buffer, self.domains)
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
        self.model = model.to(device, memory_format=torch.channels_last)
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
        """obs and next_obs, shifted, [B, K*C, H, W] in [0, 1], equal shares of the domains."""
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
        self.model.before_update()
        losses: Losses = self.model(obs, next_obs)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.optimizer.step()
        self.model.after_update()
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

    Returns the frozen encoder.

    Raises:
        ValueError: the buffer cannot be trained on: no domains, too few transitions in one, or
            frames that differ or are not square.
        CheckpointError: the checkpoint is not one of this stage and these sizes.
        DivergenceError: the loss or a weight is not finite; the last checkpoint is kept.
        Interrupted: on Ctrl-C, after a checkpoint; in the last round, after `encoder/` too.
    """
    saved = run.load_checkpoint(STAGE)
    finished = isinstance(saved, dict) and saved.get("round") == config.rounds
    if finished and has_encoder(run.encoder_dir):
        return Encoder.from_pretrained(run.encoder_dir)
    trainer = Trainer(config, buffer, seed=seed, device=torch.device(device))
    if saved is not None:
        _restore(trainer, saved, run)
    run.rewind_metrics(STAGE, trainer.round)
    updates = trainer.batches()
    names = ["+".join(domains) for domains in updates]
    plateau = Plateau(config, len(updates))
    bar = tqdm(
        total=config.rounds * len(updates), initial=trainer.round * len(updates),
        desc="pretrain", unit="update", disable=not progress,
    )  # fmt: skip
    with StopRequest() as stop, bar:
        while trainer.round < config.rounds:
            last = trainer.round + 1 == config.rounds
            logged = (trainer.round + 1) % config.log_every == 0 or last
            losses, norms = [], []
            for domains in updates:
                losses.append(trainer.update(domains))
                if logged:
                    norms.append(trainer.gradient_norm())
                bar.update()
            trainer.round += 1
            if logged:
                _check_losses(trainer, losses)
                lines = [
                    {**_figures(trainer, domains, loss), "gradient_norm": norm}
                    for domains, loss, norm in zip(updates, losses, norms, strict=True)
                ]
                for name, line in zip(names, lines, strict=True):
                    run.log(STAGE, trainer.round, domain=name, **line)
                distances, ranks = (
                    {name: line[key] for name, line in zip(names, lines, strict=True)}
                    for key in ("distance_from_trivial", "effective_rank")
                )
                plateau.check(trainer.round, distances, ranks)
                bar.set_postfix(distance=f"{sum(distances.values()) / len(distances):.3f}")
            if trainer.round % config.checkpoint_every == 0 or last or stop.requested:
                _check_losses(trainer, losses)
                _check_weights(trainer)
                run.save_checkpoint(STAGE, trainer.state())
            if stop.requested and not last:
                raise Interrupted(
                    f"pretrain stopped after round {trainer.round} of {config.rounds}"
                )
        encoder = trainer.model.export()
        encoder.metadata = _provenance(trainer, seed)
        write_card(encoder, run.encoder_dir)
        encoder.save_pretrained(run.encoder_dir)
        if stop.requested:
            raise Interrupted("pretrain is done, and its encoder written")
    return encoder.freeze()


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


def _check_transitions(
    config: PretrainConfig, buffer: ReplayBuffer, domains: tuple[str, ...]
) -> None:
    least = config.frame_stack
    found = {d: len(buffer.indices(d, frame_stack=config.frame_stack)) for d in domains}
    short = ", ".join(f"{domain} {n}" for domain, n in found.items() if n < least)
    if short:
        raise ValueError(
            f"every domain should have at least {least} transitions, as many as an observation "
            f"has frames, got {short}; record more of it, or leave it out of the dataset"
        )
    if config.batches == "mixed" and config.batch_size < len(domains):
        raise ValueError(
            f"batch_size should be at least the number of domains, {len(domains)}, with batches "
            f"mixed, got {config.batch_size}"
        )


def _restore(trainer: Trainer, saved: dict[str, Any], run: RunDirectory) -> None:
    try:
        trainer.load_state(saved)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{run.checkpoint_dir / STAGE}.pt should be a checkpoint of pretrain with this config "
            f"and dataset, and is not ({error!r}); delete it to begin the stage again"
        ) from error


def _provenance(trainer: Trainer, seed: int) -> dict[str, Any]:
    """How the encoder came about; None for what a dataset not made by crpt.collect leaves open."""
    return {
        "domains": list(trainer.domains),
        "objective": trainer.config.objective,
        "rounds": trainer.config.rounds,
        "updates": trainer.config.rounds * len(trainer.batches()),
        "batch_size": trainer.config.batch_size,
        "seed": seed,
        "transitions": max(trainer.buffer.num_transitions(d) for d in trainer.domains),
        "render": trainer.buffer.metadata.get("render"),
        "action_repeat": trainer.buffer.metadata.get("action_repeat"),
    }


def _check_losses(trainer: Trainer, losses: list[Losses]) -> None:
    values = [loss.total.item() for loss in losses]
    if not all(math.isfinite(value) for value in values):
        raise _divergence(trainer, f"the loss should be finite, got {values}")


def _check_weights(trainer: Trainer) -> None:
    # The losses are those before the last step: what it made of the weights does not show there.
    if not trainer.is_finite():
        raise _divergence(trainer, "weights and moments of Adam should be finite, and are not")


def _divergence(trainer: Trainer, what: str) -> DivergenceError:
    remedy = f"a learning_rate below {trainer.config.learning_rate:g}"
    if trainer.config.precision != "fp32":
        remedy += ", or precision fp32"
    return DivergenceError(
        f"{what}, in round {trainer.round}; the last checkpoint is kept. A run keeps its config, "
        f"so begin another one, in a new --run-dir, with {remedy}."
    )


def _figures(trainer: Trainer, domains: tuple[str, ...], loss: Losses) -> dict[str, float]:
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


if __name__ == "__main__":
    from crpt.commands import run

    run("pretrain")
