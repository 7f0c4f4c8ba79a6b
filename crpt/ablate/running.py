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
from crpt.encoder import initial_encoder
from crpt.interrupt import Interrupted
from crpt.pretrain_input import dataset_identity
from crpt.probe import probe, to_json
from crpt.replay import ReplayBuffer
from crpt.run_directory import RunDirectory
from crpt.seeds import stream_seed
from crpt.stages import PROBE_STREAM, Context, collect_stage, pretrain_stage

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
    trained_on: tuple[str, ...]
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
    probes = _probe_dataset(stages, context)
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
            trained_on=tuple(dict.fromkeys(variant.config.domains or stages.collect.domains)),
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
    found: dict[str, Any] | None = run.read_json(FIGURES)
    context = Context(run, task.seed, task.device, progress=False, dataset=task.dataset)
    if found is not None:
        trained_on = {"dataset": dataset_identity(ReplayBuffer.open(task.dataset))}
        run.check(
            {
                "seed": task.seed,
                "pretrain": task.variant.config,
                "pretrain_input": trained_on,
                "probe": task.probe,
            }
        )
        return found
    torch.set_num_threads(task.threads)
    context.claim("probe", task.probe)
    begun = time.monotonic()
    encoder = pretrain_stage(context, task.variant.config)
    trained = time.monotonic()
    result = to_json(
        probe(
            task.probe,
            ReplayBuffer.open(task.probe_dataset),
            encoder,
            initial_encoder(encoder.config, task.seed),
            seen=task.trained_on,
            device=task.device,
            progress=False,
        )
    )
    run.write_json("probe.json", result)
    figures = {
        "variant": task.variant.name,
        "x": task.variant.x,
        "seed": task.seed,
        "trained_on": list(task.trained_on),
        "updates": encoder.metadata["updates"],
        "pretrain_seconds": round(trained - begun, 1),
        "probe_seconds": round(time.monotonic() - trained, 1),
        **_probe_figures(result, task),
        **_logged(run),
    }
    run.write_json(FIGURES, figures)
    return figures


def _probe_figures(result: dict[str, Any], task: Task) -> dict[str, Any]:
    """R2 and its gain over init: means over the domains trained on and over those that no variant
    is trained on, and of each domain."""
    figures: dict[str, Any] = {}
    for features in ("z", "h"):
        rows = {r["domain"]: r for r in result["domains"] if r["features"] == features}
        groups = {"seen": task.trained_on, "unseen": task.probe.unseen}
        for group, names in groups.items():
            if names:
                r2 = [rows[name]["trained"]["r2"] for name in names]
                gain = [rows[name]["gain"] for name in names]
                figures[f"{features}_{group}"] = float(np.mean(r2))
                figures[f"{features}_{group}_gain"] = float(np.mean(gain))
        figures[f"{features}_domains"] = {name: r["trained"]["r2"] for name, r in rows.items()}
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


def _probe_dataset(stages: Stages, context: Context) -> Path:
    path = context.run.path / "probe_dataset"
    config = replace(
        stages.collect,
        domains=tuple(dict.fromkeys(stages.collect.domains + stages.probe.unseen)),
        transitions=stages.probe.episodes * stages.probe.episode_length,
        episode_length=stages.probe.episode_length,
    )
    seed = stream_seed(context.seed, PROBE_STREAM)
    collect(config, path, seed=seed, make_env=context.make_env, progress=context.progress)
    return path
