"""Stopping where a loss, a figure or a weight is not finite, before it reaches a checkpoint."""

from __future__ import annotations

import math

from crpt.objectives import Losses
from crpt.pretrain.trainer import Trainer
from crpt.run_directory import RunDirectory


class DivergenceError(RuntimeError):
    """The loss or a weight is not a finite number."""


def check_losses(trainer: Trainer, run: RunDirectory, losses: list[Losses]) -> None:
    """Every process of a team learns of a loss that is not finite in one of them."""
    first = trainer.watch.first_bad()
    if trainer.team.any(first is not None):
        where = "in another process" if first is None else f"from update {first} on"
        raise _divergence(trainer, run, f"the loss should be finite, and was not {where}")
    values = [loss.total.item() for loss in losses]
    if not all(math.isfinite(value) for value in values):
        raise _divergence(trainer, run, f"the loss should be finite, got {values}")


def check_figures(trainer: Trainer, run: RunDirectory, lines: list[dict[str, float]]) -> None:
    bad = {key: value for line in lines for key, value in line.items() if not math.isfinite(value)}
    if bad:
        check_weights(trainer, run)
        what = ", ".join(f"{key} {value}" for key, value in bad.items())
        raise _divergence(trainer, run, f"figures should be finite, got {what}")


def check_weights(trainer: Trainer, run: RunDirectory) -> None:
    # The losses are those before the last step: what it made of the weights does not show there.
    if not trainer.is_finite():
        what = "weights and moments of Adam should be finite, and are not"
        raise _divergence(trainer, run, what)


def _divergence(trainer: Trainer, run: RunDirectory, what: str) -> DivergenceError:
    remedy = f"a learning_rate below {trainer.config.learning_rate:g}"
    if trainer.config.precision != "fp32":
        remedy += ", or precision fp32"
    # Where there is none, nothing binds the run to its config.
    kept = "no checkpoint was written yet. Begin again, in the same --run-dir or another,"
    if run.has_checkpoint("pretrain"):
        kept = (
            "the last checkpoint is kept. A run keeps its config, so begin another one, in a new "
            "--run-dir,"
        )
    return DivergenceError(f"{what}, in round {trainer.round}; {kept} with {remedy}.")
