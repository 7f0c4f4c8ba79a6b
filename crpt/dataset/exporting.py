"""`python -m crpt.dataset export`: a domain's episodes as .npz files that DrQ-v2's loader reads."""

from __future__ import annotations

import datetime
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from crpt.dataset import episode_files
from crpt.files import NO_ROOM
from crpt.interrupt import Interrupted, StopRequest
from crpt.replay import DatasetFullError, OverwrittenError, ReplayBuffer
from crpt.replay.drafts import draft_directory

# Episode i is stamped i seconds later: so names sort as the episodes follow each other, and the
# same dataset gives the same files.
_EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    episodes: int
    transitions: int
    left_out: int
    """Episodes without their first or last step: still open, cut, or partly overwritten."""


def export_episodes(
    dataset: str | Path,
    target: str | Path,
    *,
    domain: str,
    frame_stack: int = 3,
    progress: bool = True,
) -> Exported:
    """Writes each whole episode of a domain as `{stamp}_{index}_{length}.npz` into a new directory.

    The directory is there when all of them are. Its arrays: crpt.dataset.episode_files; states are
    `physics`. Importing them gives the domain's bytes again.

    Args:
        dataset: a dataset directory.
        target: made; should not be there yet, or be empty.
        domain: one of the dataset's.
        frame_stack: K, frames of an observation: 3 for DrQ-v2, 1 for the smallest files.
        progress: whether to show a bar.

    Raises:
        FileExistsError: there is something at `target`.
        DatasetFullError: the disk is full; nothing is left at `target`.
        OverwrittenError: a writer overwrote an episode meanwhile.
    """
    target = Path(target)
    if frame_stack < 1:
        raise ValueError(f"frame_stack should be at least 1, got {frame_stack}")
    buffer = ReplayBuffer.open(dataset)
    arrays = buffer.arrays(domain)
    episodes = buffer.episodes(domain, frame_stack=1)
    whole = [e for e in episodes if arrays["is_first"][e[0]] and arrays["is_last"][e[-1]]]
    if not whole:
        raise ValueError(f"{domain} of {dataset} should have an episode to export, got none")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} already exists; export into another directory")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    transitions = sum(len(episode) - 1 for episode in whole)
    try:
        with draft_directory(target) as draft:
            write = partial(_write, buffer, domain, draft, frame_stack)
            # The compressor releases the GIL.
            with (
                tqdm(
                    total=transitions,
                    desc=f"export {domain}",
                    unit=" transitions",
                    disable=not progress,
                ) as bar,
                StopRequest() as stop,
                ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            ):
                try:
                    for episode, _ in zip(
                        whole, pool.map(write, range(len(whole)), whole), strict=True
                    ):
                        bar.update(len(episode) - 1)
                        if stop.requested:
                            raise Interrupted(f"nothing was left at {target}")
                finally:
                    pool.shutdown(cancel_futures=True)
            draft.rename(target)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DatasetFullError(
            f"no room for {error.filename or target}; nothing was left at {target}: make room, or "
            "choose another directory"
        ) from error
    return Exported(len(whole), transitions, len(episodes) - len(whole))


def _write(
    buffer: ReplayBuffer,
    domain: str,
    folder: Path,
    frame_stack: int,
    index: int,
    slots: NDArray[np.int64],
) -> None:
    arrays = buffer.arrays(domain)
    stamps = arrays["stamps"][slots]
    stacks = buffer.observations(domain, slots, frame_stack=frame_stack).numpy()
    content: dict[str, NDArray[Any]] = {
        "observation": stacks,
        "action": arrays["actions"][slots],
        "reward": arrays["rewards"][slots][:, None],
        "discount": arrays["discounts"][slots][:, None],
    }
    if arrays["states"].size > 0:
        content["physics"] = arrays["states"][slots]
    if not np.array_equal(stamps, arrays["stamps"][slots]):
        raise OverwrittenError(
            f"{domain} of {buffer.path} was overwritten while it was exported; stop its writer"
        )
    stamp = _EPOCH + datetime.timedelta(seconds=index)
    name = f"{stamp:%Y%m%dT%H%M%S}_{index}_{len(slots) - 1}.npz"
    episode_files.write(folder / name, content)
