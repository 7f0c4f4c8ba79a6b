"""`python -m crpt.dataset import`: .npz episodes into a domain, each as a whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crpt.dataset.episode_files import EpisodeFile, find, length_of
from crpt.files import NO_ROOM, replace_file
from crpt.interrupt import Interrupted, StopRequest
from crpt.replay import (
    DatasetError,
    DatasetFullError,
    DomainSpec,
    ReplayBuffer,
    Writer,
    require_disk_space,
)
from crpt.replay.manifest import check_names, directory

_log = logging.getLogger(__name__)


@dataclass
class Imported:
    """What an import did."""

    episodes: int = 0
    transitions: int = 0
    already_there: int = 0
    """Episodes that were in the domain before, or come twice."""
    lost: dict[str, int] = field(default_factory=dict)
    """In how many files there was something that a dataset has no place for."""


def import_episodes(
    dataset: str | Path,
    sources: Sequence[str | Path],
    *,
    domain: str,
    metadata: dict[str, Any] | None = None,
    progress: bool = True,
) -> Imported:
    """Appends the episodes in `sources` to a domain: DrQ-v2's, URLB's or ExORL's files.

    An episode is checked as a whole before any of it is written, and is in the dataset as a whole
    or not at all, whatever happens. Running it again goes on where it stopped; so does running it
    with more directories, or after files were added: an episode is known by its checksums, and is
    imported once.

    Args:
        dataset: a dataset directory; made if it is not there.
        sources: directories of .npz files (crpt.dataset.episode_files).
        domain: the task or environment they were recorded in; made if it is not there.
        metadata: what is known of the recording (render, action_repeat), for a new dataset; another
            one must say the same.
        progress: whether to show a bar.

    Raises:
        ValueError: no source.
        EpisodeFileError: a file is broken, or not like the others; those before it are imported.
        DatasetFullError: the disk has no room for all of them; nothing was written, unless it
            filled up meanwhile.
        DatasetError: the domain holds something else.
    """
    dataset = Path(dataset)
    check_names([domain])
    directories = [Path(source) for source in sources]
    if not directories:
        raise ValueError("sources should be at least one directory of .npz files, got none")
    files = find(directories)
    first = EpisodeFile(files[0])
    buffer = _open(dataset, domain, first.spec, dict(metadata or {}))
    done = Imported()
    with buffer.writer(domain, when_full="grow") as writer:
        ledger = _Ledger(directory(dataset, domain), buffer, domain)
        missing = [path for path in files if not ledger.may_have(path)]
        spec = buffer.spec(domain)
        steps = sum(length_of(path) + 1 for path in missing)
        room = buffer.capacity(domain) - buffer.cursor(domain)
        require_disk_space(dataset, max(0, steps - room) * spec.bytes_per_step())
        total = sum(map(length_of, files))
        bar = tqdm(total=total, desc=f"import {domain}", unit=" transitions", disable=not progress)
        try:
            with bar, StopRequest() as stop:
                if steps > 0:
                    writer.fit(steps)
                for path in files:
                    if stop.requested:
                        raise Interrupted(f"{done.episodes} more episodes of {domain} are in")
                    _import_one(path, buffer, domain, writer, ledger, done)
                    bar.update(length_of(path))
        finally:
            writer.fit(0)
    for what, count in done.lost.items():
        _log.warning("%s of %d files has no place in a dataset and was left out", what, count)
    return done


def _import_one(
    path: Path,
    buffer: ReplayBuffer,
    domain: str,
    writer: Writer,
    ledger: _Ledger,
    done: Imported,
) -> None:
    file = EpisodeFile(path)
    if file.checksums in ledger:
        done.already_there += 1
        return
    file.require(buffer.spec(domain))
    episode = file.read()
    ledger.add(file)
    begun = buffer.cursor(domain)
    try:
        writer.begin(episode.frames[0], episode.states[0])
        writer.extend(
            episode.frames[1:],
            episode.actions[1:],
            episode.rewards[1:],
            episode.discounts[1:],
            episode.states[1:],
            last=True,
        )
    except BaseException:
        if buffer.cursor(domain) > begun:
            writer.discard_last_episode()
        raise
    done.episodes += 1
    done.transitions += file.transitions
    for what in episode.lost:
        done.lost[what] = done.lost.get(what, 0) + 1


def _open(dataset: Path, domain: str, spec: DomainSpec, metadata: dict[str, Any]) -> ReplayBuffer:
    if not (dataset / "dataset.json").exists():
        ReplayBuffer.create(dataset, {}, {"imported": True, **metadata})
    buffer = ReplayBuffer.open(dataset)
    for name, value in metadata.items():
        if value is not None and buffer.metadata.get(name) != value:
            raise DatasetError(
                f"{dataset} was recorded with {name} {buffer.metadata.get(name)!r}, got {value!r}; "
                "import into another directory"
            )
    if domain not in buffer.domains:
        buffer.add_domain(domain, replace(spec, capacity=1))
    return buffer


class _Ledger:
    """Which files the domain's episodes came from: a line each, written ahead of the episode."""

    def __init__(self, folder: Path, buffer: ReplayBuffer, domain: str) -> None:
        self._path = folder / "imported.jsonl"
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        # Opening the writer dropped a cut episode, and here its line goes.
        have = len(buffer.episodes(domain))
        kept = [line for line in lines[:have] if line.endswith("\n")]
        if len(kept) < have:
            raise DatasetError(
                f"{domain} of {buffer.path} holds {have - len(kept)} episodes that were not "
                "imported; import into another domain or directory"
            )
        if kept != lines:
            # In one step: of a ledger that a kill cut short the episodes would be nobody's.
            replace_file(self._path, lambda path: path.write_text("".join(kept)))
        try:
            entries = [json.loads(line) for line in kept]
            self._checksums = {self._key(entry["checksums"]) for entry in entries}
            self._names = {entry["file"] for entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{self._path} should have a line for each imported episode, and one cannot be "
                f"read ({error}); restore it from a copy, or import into another directory"
            ) from error

    def __contains__(self, checksums: dict[str, int]) -> bool:
        return self._key(checksums) in self._checksums

    def may_have(self, path: Path) -> bool:
        """Without reading the file."""
        return path.name in self._names

    def add(self, file: EpisodeFile) -> None:
        entry = {"file": file.path.name, "checksums": file.checksums}
        try:
            with self._path.open("a") as ledger:
                ledger.write(json.dumps(entry) + "\n")
                ledger.flush()
                os.fsync(ledger.fileno())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise DatasetFullError(
                f"no room for another line of {self._path}; the episodes before {file.path} are "
                "whole: make room and run the same command again"
            ) from error
        self._checksums.add(self._key(file.checksums))
        self._names.add(file.path.name)

    @staticmethod
    def _key(checksums: dict[str, int]) -> tuple[tuple[str, int], ...]:
        return tuple(sorted(checksums.items()))
