"""Collect: uniform random play in every domain, recorded into one dataset."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crpt import envs
from crpt.collect.progress import Bars
from crpt.collect.random_play import MakeEnv, is_complete, record, resume
from crpt.collect.workers import record_in_processes
from crpt.replay import DatasetError, DatasetLockedError, ReplayBuffer, require_disk_space

if TYPE_CHECKING:
    from crpt.config import CollectConfig


_log = logging.getLogger(__name__)
_WORTH_A_PROCESS = 100  # transitions: fewer are recorded sooner than another process has started


class DatasetMismatchError(DatasetError):
    """The dataset at the given place was collected with other settings."""


def collect(
    config: CollectConfig,
    dataset: str | Path,
    *,
    seed: int,
    make_env: MakeEnv = envs.make,
    progress: bool = True,
) -> ReplayBuffer:
    """Records `config.transitions` transitions of each of `config.domains` into `dataset`.

    Running it again goes on where it stopped, in whatever way it stopped; asking for more
    transitions or domains adds them. The data is a function of the config and the seed alone, byte
    for byte.

    Args:
        config: what to record.
        dataset: a directory; made if it is not there.
        seed: of the whole dataset, at least 0.
        make_env: `make_env(domain, render=, action_repeat=, image_size=)` gives a gymnasium.Env
            whose frames are uint8 [C, H, W], whose actions are a bounded Box, and whose episodes
            depend on reset's seed and the actions alone. `info["state"]` is recorded if there is
            one. To be sent to other processes it should be a function of a module, or workers 1.
        progress: whether to show a bar per domain.

    Raises:
        DatasetMismatchError: `dataset` holds data of other settings or another seed.
        DatasetLockedError: another process collects into it.
        DatasetFullError: the disk has no room for all of it, or filled up on the way.
        RenderingUnavailableError: no OpenGL backend works here.
        CollectError: an environment failed; the message names its domain.
    """
    if seed < 0:
        raise ValueError(f"seed should be at least 0, got {seed}")
    dataset = Path(dataset)
    new = not dataset.exists()
    try:
        return _collect(config, dataset, seed, make_env, progress)
    except DatasetLockedError:
        raise  # another's
    except BaseException:
        if new:
            _remove_unless_recorded(dataset)
        raise


def _collect(
    config: CollectConfig, dataset: Path, seed: int, make_env: MakeEnv, progress: bool
) -> ReplayBuffer:
    buffer = _open(config, dataset, seed)
    pending = [domain for domain in config.domains if not is_complete(config, buffer, domain)]
    if pending:
        _warn_of_other_packages(buffer)
    have = {d: buffer.num_transitions(d) if d in buffer.domains else 0 for d in config.domains}
    missing = sum(config.transitions - have[domain] for domain in pending)
    require_disk_space(dataset, missing * 3 * config.image_size**2)
    with (
        _exclusive(dataset) if pending else contextlib.nullcontext(),
        Bars(config.transitions, have, disable=not progress) as bars,
    ):
        if (workers := _processes(config, missing)) > 1:
            record_in_processes(
                config,
                dataset,
                {domain: resume(buffer, domain) for domain in pending},
                workers=workers,
                seed=seed,
                make_env=make_env,
                on_progress=bars.show,
            )
        else:
            for domain in pending:
                record(
                    config,
                    buffer,
                    domain,
                    seed=seed,
                    make_env=make_env,
                    on_progress=partial(bars.show_one, domain),
                )
    return ReplayBuffer.open(dataset)


def _remove_unless_recorded(dataset: Path) -> None:
    """Of a dataset that this call has begun nothing stays unless a transition was recorded."""
    with contextlib.suppress(DatasetError, OSError), _exclusive(dataset):
        buffer = ReplayBuffer.open(dataset)
        if not any(buffer.num_transitions(d, frame_stack=1) for d in buffer.domains):
            shutil.rmtree(dataset)


@contextlib.contextmanager
def _exclusive(dataset: Path) -> Iterator[None]:
    """Nobody else collects into the dataset; the lock goes with the process, however it ends."""
    with (dataset / ".collecting").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatasetLockedError(
                f"{dataset} is being collected by another process; wait for it, or stop it"
            ) from None
        yield


def _processes(config: CollectConfig, missing: int) -> int:
    if config.workers != "auto":
        return config.workers
    return min(len(os.sched_getaffinity(0)), -(-missing // _WORTH_A_PROCESS))


def _open(config: CollectConfig, dataset: Path, seed: int) -> ReplayBuffer:
    settings: dict[str, Any] = {
        "seed": seed,
        "render": config.render,
        "action_repeat": config.action_repeat,
        "image_size": config.image_size,
        "episode_length": config.episode_length,
    }
    if not (dataset / "dataset.json").exists():
        return ReplayBuffer.create(dataset, {}, {**settings, "versions": _versions()})
    buffer = ReplayBuffer.open(dataset)
    different = _differences(buffer.metadata, settings)
    if different and not buffer.domains:
        # A first attempt that recorded nothing, with a mistyped name say, binds nobody.
        (dataset / "dataset.json").unlink()
        return _open(config, dataset, seed)
    if different:
        raise DatasetMismatchError(
            f"{dataset} was collected with other settings ({different}): "
            "collect with those, or into another directory"
        )
    return buffer


def _warn_of_other_packages(buffer: ReplayBuffer) -> None:
    different = _differences(buffer.metadata["versions"], _versions())
    if different:
        _log.warning(
            "%s was begun with other packages (%s): what is added may differ from what they would "
            "have added",
            buffer.path,
            different,
        )


def _versions() -> dict[str, str]:
    names = ("dm_control", "mujoco", "gymnasium", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} {there.get(name)!r} there, {value!r} here"
        for name, value in here.items()
        if there.get(name) != value
    )
