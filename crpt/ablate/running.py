"""Training and probing the variants of a study, one after the other or some at a time."""

from __future__ import annotations

import glob
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from crpt.ablate.checks import check_variants
from crpt.ablate.studies import Variant
from crpt.ablate.task import FIGURES, Task, check_config, known_at_init, train_and_probe
from crpt.collect import collect
from crpt.config import EncoderStages
from crpt.interrupt import Interrupted
from crpt.memory import keep_freed_memory
from crpt.replay import ReplayBuffer
from crpt.run_directory import ConfigMismatchError
from crpt.seeds import stream_seed
from crpt.stages import PROBE_STREAM, Context, collect_stage


class RunsFailedError(RuntimeError):
    """Some runs of a study have failed; `rows` are the figures of the others."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


def run_study(
    variants: list[Variant],
    stages: EncoderStages,
    context: Context,
    *,
    seeds: tuple[int, ...],
    jobs: int,
    only: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """The figures of every variant with every seed, or only of those named so; and of what else of
    these variants is measured in the run directory. That is not measured again.

    The random play to train on and to probe is the same for all: that of the context's seed.

    Raises:
        ValueError: what is asked for cannot be trained; nothing was.
        ConfigMismatchError: a run was begun with another config or dataset; nothing was trained.
        RunsFailedError: some have failed, after the others.
    """
    if jobs < 1:
        raise ValueError(f"jobs should be at least 1, got {jobs}")
    chosen = [variant for variant in variants if not only or variant.name in only]
    dataset = None if context.dataset is None else ReplayBuffer.open(context.dataset)
    check_variants(chosen, stages, dataset)
    _check_growth(stages, context)
    runs = {v: _seeds_measured(v, context) | set(seeds if v in chosen else ()) for v in variants}
    tasks = _tasks(runs, stages, context, jobs)
    for task in tasks:
        check_config(task)
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
    rows = [done[i] for i in sorted(done)]
    if failed:
        first = min(failed)
        names = ", ".join(tasks[i].run_dir.name for i in sorted(failed))
        raise RunsFailedError(
            f"{len(failed)} of {len(tasks)} runs failed, {names}; the others are measured. "
            f"{tasks[first].run_dir.name}: {type(failed[first]).__name__}: {failed[first]}",
            rows,
        ) from failed[first]
    return rows


def _tasks(
    runs: dict[Variant, set[int]], stages: EncoderStages, context: Context, jobs: int
) -> list[Task]:
    """One of each variant and seed; records the random play that they need."""
    probed = tuple(dict.fromkeys(stages.collect.domains + stages.probe.unseen))
    probes = _probe_dataset(stages, context, probed)
    lengths = sorted({variant.transitions for variant, seeds in runs.items() if seeds})
    datasets = {length: _dataset(stages, context, length) for length in lengths}
    threads = max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 else torch.get_num_threads()
    return [
        Task(
            variant=variant,
            seed=seed,
            run_dir=_runs(context) / f"{variant.name}-seed{seed}",
            dataset=datasets[variant.transitions],
            probe_dataset=probes,
            probe=stages.probe,
            probed=probed,
            device=context.device,
            threads=threads,
        )
        for variant, seeds in runs.items()
        for seed in sorted(seeds)
    ]


def _runs(context: Context) -> Path:
    return context.run.path / "runs"


def _seeds_measured(variant: Variant, context: Context) -> set[int]:
    begin = f"{variant.name}-seed"
    found = _runs(context).glob(f"{glob.escape(begin)}*/{FIGURES}")
    seeds = [path.parent.name.rpartition("-seed")[2] for path in found]
    return {int(seed) for seed in seeds if seed.isdecimal()}


def _check_growth(stages: EncoderStages, context: Context) -> None:
    """The run directory's own play may not grow under the runs that were trained on it."""
    recorded = context.run.read_config().get("collect")
    if context.dataset is not None or not recorded or not any(_runs(context).rglob(FIGURES)):
        return
    asked = {"domains": list(stages.collect.domains), "transitions": stages.collect.transitions}
    differing = [f"{k}: {recorded[k]} -> {v}" for k, v in asked.items() if recorded[k] != v]
    if differing:
        raise ConfigMismatchError(
            f"{context.run.path} holds runs that were trained on other play (there -> asked for), "
            f"{', '.join(differing)}; ask for the same, or choose another --run-dir"
        )


@contextmanager
def _submitted(
    tasks: list[Task], jobs: int
) -> Iterator[Iterator[tuple[int, Callable[[], dict[str, Any]]]]]:
    """(number, what gives the figures or raises) of the tasks as they are done."""
    # All variants of a seed before the next one: they share what they begin with, and a study that
    # is interrupted has whole seeds, of which a table can be asked for.
    order = sorted(range(len(tasks)), key=lambda i: tasks[i].seed)
    if jobs == 1:
        known_at_init.cache_clear()  # of play that may have lain in the same place
        yield ((i, partial(train_and_probe, tasks[i])) for i in order)
        return
    # Spawned: a process that was forked cannot use a GPU.
    spawn = multiprocessing.get_context("spawn")
    workers = min(jobs, len(tasks))
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=keep_freed_memory) as pool:
        futures = {pool.submit(train_and_probe, tasks[i]): i for i in order}
        try:
            yield ((futures[future], future.result) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _dataset(stages: EncoderStages, context: Context, transitions: int) -> Path:
    """Random play of that length; more of it begins with what there is less of."""
    if transitions == stages.collect.transitions:
        if context.dataset is None:
            collect_stage(context, stages.collect)
        return context.dataset_dir
    path = context.run.path / f"dataset_{transitions}"
    config = replace(stages.collect, transitions=transitions)
    collect(config, path, seed=context.seed, make_env=context.make_env, progress=context.progress)
    return path


def _probe_dataset(stages: EncoderStages, context: Context, domains: tuple[str, ...]) -> Path:
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
