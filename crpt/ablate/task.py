"""One training of a study: what it is to do, and what it leaves."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crpt.ablate.studies import Variant
from crpt.config import ProbeConfig
from crpt.encoder import Encoder, EncoderConfig, initial_encoder
from crpt.pretrain import STAGE as PRETRAIN
from crpt.pretrain.inputs import dataset_identity
from crpt.probe import probe, to_json
from crpt.probe.knowledge import Knowledge, measure
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory
from crpt.stages import Context, pretrain_stage

FIGURES = "figures.json"
# Of the last logged round, means over its batches.
LOGGED = (
    "distance_from_trivial",
    "effective_rank",
    "prototypes_in_use",
    "usage_entropy",
    "prototype_similarity_mean",
    "prototype_similarity_max",
)


@dataclass(frozen=True)
class Task:
    """One variant with one seed, and where everything is."""

    variant: Variant
    seed: int
    run_dir: Path
    dataset: Path
    probe_dataset: Path
    probe: ProbeConfig
    probed: tuple[str, ...]
    """Domains: those of the study's random play, and the others that are asked for."""
    device: str
    threads: int


def check_config(task: Task) -> None:
    """ConfigMismatchError where the run was begun as another."""
    RunDirectory(task.run_dir).check(
        {
            "seed": task.seed,
            "pretrain": task.variant.config,
            "pretrain_input": dataset_identity(ReplayBuffer.open(task.dataset)),
            "probe": task.probe,
        }
    )


def train_and_probe(task: Task) -> dict[str, Any]:
    """The figures of one task, also in its run directory."""
    run = RunDirectory(task.run_dir)
    found: dict[str, Any] = run.read_json(FIGURES) or {}
    if not found or not set(task.probed) <= _probed(run):
        found |= _measure(task, run)
    # Anew from what was measured, for what is asked to be probed may have changed.
    return found | _probe_figures(run, task.probed)


def _measure(task: Task, run: RunDirectory) -> dict[str, Any]:
    """Train and probe; leaves probe.json, and what else is to be told of the run."""
    torch.set_num_threads(task.threads)
    before: dict[str, Any] = run.read_json(FIGURES) or {}
    context = Context(run, task.seed, task.device, progress=False, dataset=task.dataset)
    context.claim("probe", task.probe)
    begun = time.monotonic()
    config = replace(task.variant.config, keep_checkpoints=1)
    encoder = pretrain_stage(context, config)
    trained = time.monotonic()
    at_init = known_at_init(
        replace(encoder.config, prototypes=0),  # as the initial one has
        task.seed,
        task.probe,
        task.probe_dataset,
        task.probed,
        encoder.frame_stack,
        task.device,
    )
    result = probe(
        task.probe,
        ReplayBuffer.open(task.probe_dataset),
        encoder,
        at_init,
        seen=tuple(encoder.metadata["domains"]),
        domains=task.probed,
        device=task.device,
        progress=False,
    )
    run.write_json("probe.json", to_json(result))
    # What training goes on from is no longer needed, only that it is over: an encoder is left.
    run.save_checkpoint(PRETRAIN, {"round": config.rounds})
    figures = {
        "variant": task.variant.name,
        "x": task.variant.x,
        "seed": task.seed,
        "trained_on": encoder.metadata["domains"],
        "updates": encoder.metadata["updates"],
        # Trained already, it would take no time now.
        "pretrain_seconds": before.get("pretrain_seconds", round(trained - begun, 1)),
        "probe_seconds": round(time.monotonic() - trained, 1),
        **_logged(run),
    }
    run.write_json(FIGURES, figures | _probe_figures(run, task.probed))
    return figures


@lru_cache(maxsize=8)
def known_at_init(
    config: EncoderConfig,
    seed: int,
    probe_config: ProbeConfig,
    dataset: Path,
    domains: tuple[str, ...],
    frame_stack: int,
    device: str,
) -> Knowledge:
    """Most variants of a study begin with the same encoder. Its embeddings are not kept."""
    known = measure(
        probe_config,
        ReplayBuffer.open(dataset),
        initial_encoder(config, seed),
        domains,
        frame_stack=frame_stack,
        device=device,
        progress=False,
    )
    return replace(known, z={})


def _probed(run: RunDirectory) -> set[str]:
    probes = run.read_json("probe.json") or {"domains": []}
    return {row["domain"] for row in probes["domains"]}


def _probe_figures(run: RunDirectory, probed: tuple[str, ...]) -> dict[str, Any]:
    """R2 and its gain over init: of each of these domains, and means over those that the encoder
    was trained on and over the others."""
    probes = run.read_json("probe.json")["domains"]
    encoder = Encoder.from_pretrained(run.encoder_dir)
    trained_on = set(encoder.metadata["domains"])
    figures: dict[str, Any] = {"trained_on": sorted(trained_on)}
    for features in ("z", "h"):
        rows = {r["domain"]: r for r in probes if r["features"] == features}
        r2 = {name: rows[name]["trained"]["r2"] for name in probed}
        gains = {name: rows[name]["gain"] for name in probed}
        groups = {"seen": trained_on & set(probed), "unseen": set(probed) - trained_on}
        for group, names in groups.items():
            if names:
                figures[f"{features}_{group}"] = float(np.mean([r2[n] for n in sorted(names)]))
                gain = float(np.mean([gains[n] for n in sorted(names)]))
                figures[f"{features}_{group}_gain"] = gain
        figures |= {f"{features}_domains": r2, f"{features}_gains": gains}
    return figures


def _logged(run: RunDirectory) -> dict[str, float]:
    lines = run.metrics("pretrain")
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    return {key: float(np.mean([line[key] for line in last])) for key in LOGGED if key in last[0]}
