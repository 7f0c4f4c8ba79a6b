"""Pre-training: from random play to a frozen encoder (`python -m crpt.pretrain`)."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import crpt
from crpt.config import PretrainConfig
from crpt.distributed import ALONE, Team, lost_processes_named
from crpt.encoder import Encoder, has_encoder
from crpt.interrupt import Interrupted, StopRequest
from crpt.model_card import write_card
from crpt.pretrain import divergence
from crpt.pretrain.divergence import DivergenceError
from crpt.pretrain.feeds import Domains
from crpt.pretrain.inputs import dataset_identity, warn_of_left_out_namesakes
from crpt.pretrain.log import Line, Turn, distances, lines, of_all
from crpt.pretrain.plateau import FEWEST_ROWS, Plateau
from crpt.pretrain.trainer import Trainer
from crpt.replay import ReplayBuffer
from crpt.replay.together import name_of
from crpt.run_directory import CheckpointError, RunDirectory, plain

__all__ = ["STAGE", "DivergenceError", "Trainer", "pretrain"]

STAGE = "pretrain"


def pretrain(
    config: PretrainConfig,
    buffer: ReplayBuffer,
    run: RunDirectory,
    *,
    seed: int,
    device: str = "cpu",
    progress: bool = True,
    team: Team = ALONE,
) -> Encoder:
    """Train on the buffer's domains for `config.rounds` rounds, from the last checkpoint on; write
    `encoder/`.

    In a team every process calls this with the same arguments; each trains on its share of every
    batch, and the one that leads writes the files.

    On a CPU an update is faster after `crpt.memory.keep_freed_memory()`, which the command calls
    and this does not: it is for the whole process.

    Returns the frozen encoder.

    Raises:
        ValueError: the buffer cannot be trained on: no domains, too few transitions in one, or
            frames that differ or are not square; or the processes of a team differ in config,
            seed, precision or files.
        ConfigMismatchError: the checkpoint was begun with another config, seed or dataset; fields
            that are resumable may differ.
        CheckpointError: the checkpoint is not one of this stage and these sizes.
        DivergenceError: the loss or a weight is not finite; the last checkpoint, if any, is kept.
        TeamError: another process has ended, or cannot be reached; the last checkpoint is kept.
        BackendError: the processes cannot reach each other for another reason; likewise.
        Interrupted: on Ctrl-C, after a checkpoint; in the last round, after `encoder/` too.
    """
    saved = run.load_checkpoint(STAGE)
    done = saved.get("round") if isinstance(saved, dict) else None
    exported = has_encoder(run.encoder_dir)
    identity = dataset_identity(buffer)
    _require_same_run(team, config, seed, identity, done, exported)
    begun = {"seed": seed, STAGE: config, f"{STAGE}_input": identity}
    _check_begun_with(run, saved, begun)
    if done == config.rounds and exported:
        return Encoder.from_pretrained(run.encoder_dir)
    trainer = Trainer(config, buffer, seed=seed, device=torch.device(device), team=team)
    team.require_same(
        {"precision": trainer.config.precision},
        "auto is not the same on all hosts: choose --precision fp32, or bf16",
    )
    if saved is not None:
        _restore(trainer, saved, run)
    if team.leads:
        warn_of_left_out_namesakes(config, buffer)
        run.rewind_logs(STAGE, trainer.round)
    per_round = trainer.turns.per_round
    plateau = Plateau(config, per_round)
    bar = tqdm(
        total=config.rounds * per_round, initial=trainer.round * per_round,
        desc="pretrain", unit="update", disable=not (progress and team.leads),
    )  # fmt: skip
    stopping = False
    pace = _Pace(trainer.domains)
    with StopRequest() as stop, bar, lost_processes_named(partial(_what_is_kept, run)):
        while trainer.round < config.rounds:
            last = trainer.round + 1 == config.rounds
            logged = (trainer.round + 1) % config.log_every == 0 or last
            updates = trainer.batches()
            losses, norms = [], []
            for domains in updates:
                losses.append(trainer.update(domains))
                if logged:
                    norms.append(trainer.gradient_norm())
                pace.count(domains)
                bar.update()
            trainer.round += 1
            for name, distance in distances(trainer, updates, losses).items():
                plateau.observe(name, distance)
            if logged:
                losses = [of_all(team, loss) for loss in losses]
                divergence.check_losses(trainer, run, losses)
                figures = lines(trainer, list(map(Turn, updates, losses, norms)))
                divergence.check_figures(trainer, run, list(figures.values()))
                if team.leads:
                    for name, line in figures.items():
                        run.log(STAGE, trainer.round, domain=name, **line)
                    for name, rate in pace.since_last().items():
                        run.log_speed(STAGE, trainer.round, domain=name, updates_per_second=rate)
                    plateau.check(
                        trainer.round,
                        _ranks(trainer, figures),
                        _perplexities(figures),
                        _similarity(figures),
                    )
                mean = sum(line["distance_from_trivial"] for line in figures.values())
                bar.set_postfix(distance=f"{mean / len(figures):.3f}")
            stopping = team.any(stop.requested)
            if trainer.round % config.checkpoint_every == 0 or last or stopping:
                divergence.check_losses(trainer, run, losses)
                divergence.check_weights(trainer, run)
                # The others wait: when one has ended, torchrun ends one that still saves.
                team.lead(partial(_save, run, trainer, begun))
            if stopping and not last:
                raise Interrupted(
                    f"pretrain stopped after round {trainer.round} of {config.rounds}"
                )
        encoder = trainer.model.export()
        encoder.metadata = _provenance(trainer, seed)
        team.lead(partial(_export, encoder, run))
        if stopping:
            raise Interrupted("pretrain is done, and its encoder written")
    return encoder.freeze()


class _Pace:
    """Updates per second, measured where the host has waited for the device anyway."""

    def __init__(self, domains: Domains) -> None:
        self._then, self._updates = time.monotonic(), dict.fromkeys(domains, 0)

    def count(self, domains: Domains) -> None:
        """An update on these."""
        for domain in set(domains):
            self._updates[domain] += 1

    def since_last(self) -> dict[str, float]:
        """Of each domain, those that had rows of it: mixed ones count for all."""
        now = time.monotonic()
        seconds = max(now - self._then, 1e-9)
        rates = {domain: round(n / seconds, 2) for domain, n in self._updates.items()}
        self._then, self._updates = now, dict.fromkeys(self._updates, 0)
        return rates


def _ranks(trainer: Trainer, figures: dict[str, Line]) -> dict[str, float]:
    """Of z, where there are rows enough for a rank that tells healthy embeddings from collapsed."""
    return {
        name: line["effective_rank"]
        for name, line in figures.items()
        if trainer.rows_of(name) >= FEWEST_ROWS
    }


def _perplexities(figures: dict[str, Line]) -> dict[str, float]:
    """Of the codes, where the objective has some."""
    key = "assignment_perplexity"
    return {name: line[key] for name, line in figures.items() if key in line}


def _similarity(figures: dict[str, Line]) -> float | None:
    """Mean of the prototypes, which all domains share, where there are some."""
    return next(iter(figures.values())).get("prototype_similarity_mean")


def check_checkpoint(run: RunDirectory, sections: dict[str, Any]) -> None:
    """ConfigMismatchError where the checkpoint was begun with another config, seed or dataset."""
    _check_begun_with(run, run.load_checkpoint(STAGE), sections)


def _check_begun_with(run: RunDirectory, saved: Any, sections: dict[str, Any]) -> None:
    if isinstance(saved, dict) and "begun_with" in saved:  # not in those of earlier releases
        run.compare(saved["begun_with"], sections)


def _require_same_run(
    team: Team,
    config: PretrainConfig,
    seed: int,
    identity: dict[str, dict[str, Any]],
    done: int | None,
    exported: bool,
) -> None:
    """Otherwise they would train on shares of different batches, or wait for each other in vain."""
    team.require_same(
        {"seed": seed} | asdict(config), "start all processes with the same arguments"
    )
    files = {"round of the checkpoint": done, "encoder exported": exported}
    dataset = {f"{part}.{k}": value for part, told in identity.items() for k, value in told.items()}
    team.require_same(
        files | dataset, "put --run-dir and the datasets where all hosts see the same files"
    )


def _save(run: RunDirectory, trainer: Trainer, begun: dict[str, Any]) -> None:
    run.save_checkpoint(
        STAGE,
        trainer.state() | {"begun_with": plain(begun)},
        step=trainer.round,
        keep=trainer.config.keep_checkpoints,
    )


def _export(encoder: Encoder, run: RunDirectory) -> None:
    write_card(encoder, run.encoder_dir)
    encoder.save_pretrained(run.encoder_dir)


def _what_is_kept(run: RunDirectory) -> str:
    try:
        saved = run.load_checkpoint(STAGE)
    except CheckpointError as error:
        return str(error)
    if saved is None:
        return "No checkpoint was written yet: the same command begins again"
    return f"The checkpoint of round {saved['round']} is kept: the same command goes on from it"


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
    config, recorded = trainer.config, trainer.buffer.metadata
    held: Counter[str] = Counter()
    for domain in trainer.domains:
        held[name_of(domain)] += trainer.buffer.num_transitions(domain)
    spread = config.objective == "crptpro" and config.intrinsic != "none"
    return {
        "domains": list(dict.fromkeys(map(name_of, trainer.domains))),
        "weights": _weights(trainer),
        "objective": trainer.config.objective,
        "rounds": trainer.config.rounds,
        "updates": trainer.config.rounds * trainer.turns.per_round,
        "batch_size": trainer.config.batch_size,
        "seed": seed,
        "transitions": dict(held),
        "dataset_seeds": recorded.get("seeds", [recorded.get("seed")]),
        "render": recorded.get("render"),
        "action_repeat": recorded.get("action_repeat"),
        "frame_stack": config.frame_stack,
        "precision": config.precision,
        "learning_rate": config.learning_rate,
        "schedule": config.schedule,
        "intrinsic": config.intrinsic if spread else None,
        "intrinsic_weight": config.intrinsic_weight if spread else None,
        "versions": {"crpt": crpt.__version__, "torch": str(torch.__version__)},
    }


def _weights(trainer: Trainer) -> dict[str, int] | None:
    """Of the domains, in lowest terms; None where they are equal."""
    found = {domain: trainer.turns.weight_of(domain) for domain in trainer.domains}
    return found if len(set(found.values())) > 1 else None
