"""Training and probing the variants of a study, one after the other or some at a time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from crpt.ablate.studies import Variant
from crpt.collect import collect
from crpt.config import ProbeConfig, Stages
from crpt.encoder import Encoder, initial_encoder
from crpt.interrupt import Interrupted
from crpt.probe import probe, to_json
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory
from crpt.seeds import stream_seed
from crpt.stages import PROBE_STREAM, Context, collect_stage, dataset_identity, pretrain_stage

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


def run_study(
    variants: list[Variant], stages: Stages, context: Context, *, seeds: tuple[int, ...], jobs: int
) -> list[dict[str, Any]]:
    """The figures of every variant with every seed, in that order; those that are there already
    are not measured again. Raises RuntimeError, after the others, for those that fail.

    The random play to train on and to probe is the same for all: that of the context's seed.
    """
    if jobs < 1:
        raise ValueError(f"jobs should be at least 1, got {jobs}")
    probed = tuple(dict.fromkeys(stages.collect.domains + stages.probe.unseen))
    probes = _probe_dataset(stages, context, probed)
    datasets = {n: _dataset(stages, context, n) for n in sorted({v.transitions for v in variants})}
    threads = max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 else torch.get_num_threads()
    tasks = [
        Task(
            variant=variant,
            seed=seed,
            run_dir=context.run.path / "runs" / f"{variant.name}-seed{seed}",
            dataset=datasets[variant.transitions],
            probe_dataset=probes,
            probe=stages.probe,
            probed=probed,
            device=context.device,
            threads=threads,
        )
        for variant in variants
        for seed in seeds
    ]
    done: dict[int, dict[str, Any]] = {}
    failed: dict[int, Exception] = {}
    bar = tqdm(total=len(tasks), desc="ablate", unit="run", disable=not context.progress)
    with bar, _submitted(tasks, jobs) as results:
        for i, get in results:
            try:
                done[i] = get()
            except Interrupted:
                raise
            except Exception as error:  # the others go on
                failed[i] = error
            bar.update()
            bar.set_postfix_str(tasks[i].variant.name)
    if failed:
        first = min(failed)
        names = ", ".join(tasks[i].run_dir.name for i in sorted(failed))
        raise RuntimeError(
            f"{len(failed)} of {len(tasks)} runs failed, {names}; the others are measured. "
            f"{tasks[first].run_dir.name}: {type(failed[first]).__name__}: {failed[first]}"
        ) from failed[first]
    return [done[i] for i in range(len(tasks))]


def train_and_probe(task: Task) -> dict[str, Any]:
    """The figures of one task, also in its run directory."""
    run = RunDirectory(task.run_dir)
    dataset = {"dataset": dataset_identity(ReplayBuffer.open(task.dataset))}
    asked = {"seed": task.seed, "pretrain": task.variant.config, "pretrain_input": dataset}
    run.check({**asked, "probe": task.probe})
    found: dict[str, Any] = run.read_json(FIGURES) or {}
    if not found or not set(task.probed) <= _probed(run):
        found |= _measure(task, run)
    # Anew from what was measured, for what is asked to be probed may have changed.
    return found | _probe_figures(run, task.probed)


def _measure(task: Task, run: RunDirectory) -> dict[str, Any]:
    """Train and probe; leaves probe.json, and what else is to be told of the run."""
    torch.set_num_threads(task.threads)
    context = Context(run, task.seed, task.device, progress=False, dataset=task.dataset)
    context.claim("probe", task.probe)
    begun = time.monotonic()
    encoder = pretrain_stage(context, task.variant.config)
    trained = time.monotonic()
    result = probe(
        task.probe,
        ReplayBuffer.open(task.probe_dataset),
        encoder,
        initial_encoder(encoder.config, task.seed),
        seen=tuple(encoder.metadata["domains"]),
        domains=task.probed,
        device=task.device,
        progress=False,
    )
    run.write_json("probe.json", to_json(result))
    figures = {
        "variant": task.variant.name,
        "x": task.variant.x,
        "seed": task.seed,
        "trained_on": encoder.metadata["domains"],
        "updates": encoder.metadata["updates"],
        "pretrain_seconds": round(trained - begun, 1),
        "probe_seconds": round(time.monotonic() - trained, 1),
        **_logged(run),
    }
    run.write_json(FIGURES, figures | _probe_figures(run, task.probed))
    return figures


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


@contextmanager
def _submitted(
    tasks: list[Task], jobs: int
) -> Iterator[Iterator[tuple[int, Callable[[], dict[str, Any]]]]]:
    """(number, what gives the figures or raises) of the tasks as they are done."""
    if jobs == 1:
        yield ((i, partial(train_and_probe, task)) for i, task in enumerate(tasks))
        return
    # Spawned: a process that was forked cannot use a GPU.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=spawn) as pool:
        futures = {pool.submit(train_and_probe, task): i for i, task in enumerate(tasks)}
        try:
            yield ((futures[future], future.result) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _dataset(stages: Stages, context: Context, transitions: int) -> Path:
    """Random play of that length; more of it begins with what there is less of."""
    if transitions == stages.collect.transitions:
        if context.dataset is None:
            collect_stage(context, stages.collect)
        return context.dataset_dir
    path = context.run.path / f"dataset_{transitions}"
    config = replace(stages.collect, transitions=transitions)
    collect(config, path, seed=context.seed, make_env=context.make_env, progress=context.progress)
    return path


def _probe_dataset(stages: Stages, context: Context, domains: tuple[str, ...]) -> Path:
    path = context.run.path / "probe_dataset"
    config = replace(
        stages.collect,
        domains=domains,
        transitions=stages.probe.episodes * stages.probe.episode_length,
        episode_length=stages.probe.episode_length,
    )
    seed = stream_seed(context.seed, PROBE_STREAM)
    collect(config, path, seed=seed, make_env=context.make_env, progress=context.progress)
    return path
