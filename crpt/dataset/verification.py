"""`python -m crpt.dataset verify`: whether all that a dataset counts as written is there, and true.

The protocol that it holds the files to: csrc/replay/ring.h.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crpt.replay import DatasetError, DatasetLockedError, DomainSpec, manifest
from crpt.replay.locks import lock
from crpt.replay.npy import HEADER_BYTES, map_array, read_length
from crpt.replay.places import CURSOR, EPOCH, WORD_BYTES, Directory

_BUSY = np.uint64(1 << 63)
_SHOWN = 5  # steps named in a message
_READ_BYTES = 16 << 20  # of frames, at a time
_BESIDE = {"imported.jsonl"}


@dataclass
class DomainReport:
    """What was found of one domain."""

    domain: str
    steps: int = 0
    """Committed ones that are still there."""
    transitions: int = 0
    episodes: int = 0
    """Whole ones."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is as it may be: an open episode, a file longer than needed, a black frame."""


def verify(dataset: str | Path, *, gaps: bool = False) -> list[DomainReport]:
    """Checks every domain: the files' headers and sizes, and every committed step.

    A step is whole (its stamp), linked to the one before it, and its reward, discount and action
    are numbers; episodes begin with a first step and go on until the last one; no step that was
    counted is missing, but those that a shared writer gave up. All frames are read once.

    Args:
        dataset: a dataset directory.
        gaps: whether steps that shared writers never finished, or took tickets for and never began,
            because they died, are fine.

    Raises:
        DatasetVersionError, DatasetCorruptError: dataset.json cannot be read.
        DatasetLockedError: a domain is being written.
    """
    dataset = Path(dataset)
    domains, _ = manifest.read(dataset)
    return [
        _verify(manifest.directory(dataset, name), name, domains[name], gaps) for name in domains
    ]


def _verify(folder: Path, name: str, spec: DomainSpec, gaps: bool) -> DomainReport:
    report = DomainReport(name)
    if not folder.is_dir():
        report.problems.append(f"{folder} is missing")
        return report
    place = Directory(folder)
    known = {f"{field}.npy" for field in spec.fields()} | {CURSOR, EPOCH} | _BESIDE
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            report.notes.append(f"{path} is no file of a dataset")
    try:
        with _nobody_writes(place), contextlib.ExitStack() as stack:
            arrays = _arrays(place, spec, stack, report)
            words = {name: _word(place, name, report) for name in (CURSOR, EPOCH)}
            head, epoch = words[CURSOR], words[EPOCH]
            if arrays is not None and head is not None and epoch is not None:
                _Steps(arrays, head, epoch, gaps, report).check()
                frames = stack.enter_context(place.open("frames", write=False))
                _read_frames(frames, place.label("frames"), arrays["stamps"], spec, report)
    except DatasetLockedError:
        raise
    except (DatasetError, OSError) as error:
        report.problems.append(str(error))
    return report


@contextlib.contextmanager
def _nobody_writes(place: Directory) -> Iterator[None]:
    with place.open(CURSOR, write=False) as file:
        # Held until the end: a writer that opens meanwhile is told.
        if not lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, place.label(CURSOR)):
            raise DatasetLockedError(
                f"{place.label(CURSOR)} says that the domain is being written; wait for the "
                "writer, or stop it"
            )
        yield


def _arrays(
    place: Directory, spec: DomainSpec, stack: contextlib.ExitStack, report: DomainReport
) -> dict[str, NDArray[Any]] | None:
    """All arrays, of the slots that all of them have; none if a file is not as it should be."""
    lengths: dict[str, int] = {}
    files: dict[str, FileIO] = {}
    for name in spec.fields():
        try:
            files[name] = stack.enter_context(place.open(name, write=False))
            lengths[name] = read_length(files[name], place.label(name), spec, name)
        except DatasetError as error:
            report.problems.append(str(error))
    if len(lengths) < len(spec.fields()):
        return None
    capacity = min(lengths.values())
    for name, (dtype, shape) in spec.fields().items():
        slot = dtype.itemsize * int(np.prod(shape))
        more = place.size(name) - HEADER_BYTES - capacity * slot
        if more > 0:
            report.notes.append(
                f"{place.label(name)} is {more} bytes longer than needed: a resize was cut short"
            )
    return {
        name: map_array(files[name], spec, name, capacity, write=False)[0] for name in spec.fields()
    }


def _word(place: Directory, name: str, report: DomainReport) -> int | None:
    with place.open(name, write=False) as file:
        content = file.read()
    if len(content) == WORD_BYTES:
        return int.from_bytes(content, "little")
    report.problems.append(
        f"{place.label(name)} should have {WORD_BYTES} bytes, got {len(content)}"
    )
    return None


class _Steps:
    """The tickets that are still in the ring, oldest first, and what their slots say."""

    def __init__(
        self,
        arrays: dict[str, NDArray[Any]],
        head: int,
        epoch: int,
        gaps: bool,
        report: DomainReport,
    ) -> None:
        capacity = len(arrays["stamps"])
        if head > 1 << 62:
            # Not a count of anything; no ticket of it can be looked at.
            report.problems.append(f"cursor should count the steps, got {head}")
            head = 0
        self._arrays, self._head, self._epoch = arrays, head, epoch
        self._gaps, self._report = gaps, report
        self._capacity = capacity
        self._oldest = max(0, head - capacity)
        self._tickets = np.arange(self._oldest, head, dtype=np.uint64)
        self._slots = (self._tickets % np.uint64(capacity)).astype(np.int64)

    def check(self) -> None:
        self._stamps()
        self._flags()
        self._links()
        self._values()
        self._report.steps = int(self._whole.sum())

    def _of(self, name: str) -> NDArray[Any]:
        return self._arrays[name][self._slots]

    def _rows(self, name: str) -> NDArray[Any]:
        values = self._of(name)
        return values.reshape(len(values), int(np.prod(values.shape[1:])))

    def _stamps(self) -> None:
        stamps = self._of("stamps")
        self._whole = stamps == self._tickets + np.uint64(1)
        # Tickets that a shared writer took in advance, and gave up when it closed.
        given_up = (stamps == 0) & (self._of("previous") == ~self._tickets)
        lost = ~self._whole & ~given_up
        emptied = self._rolled_back(stamps)
        lost[len(lost) - emptied :] = False
        if emptied:
            self._report.notes.append(
                f"{emptied} steps of a cut episode are being dropped; the next writer goes on"
            )
        if self._gaps and lost.any():
            busy = int((stamps[lost] & _BUSY != 0).sum())
            self._report.notes.append(
                f"{int(lost.sum())} steps were never finished, {busy} of them begun: a writer died "
                "or was overtaken"
            )
        elif lost.any():
            self._problem("were counted, but are not there", lost)
        # Beyond the cursor: the step of a writer killed before it counted it, or a tail.
        rest = np.ones(self._capacity, bool)
        rest[self._slots] = False
        beyond = self._arrays["stamps"][rest]
        newer = int((beyond & ~_BUSY > np.uint64(self._head + 1)).sum())
        if newer:
            self._report.problems.append(f"{newer} steps are there that the cursor does not count")
        elif np.any(beyond):
            self._report.notes.append(
                f"{np.count_nonzero(beyond)} slots hold the beginning of a step that was not "
                "committed; the next writer clears them"
            )

    def _rolled_back(self, stamps: NDArray[np.uint64]) -> int:
        """Newest steps that a writer cleared which was killed before it set the cursor back."""
        if self._epoch == 0:
            return 0
        there = np.flatnonzero(stamps)
        return len(stamps) - (int(there[-1]) + 1 if len(there) else 0)

    def _flags(self) -> None:
        for name in ("is_first", "is_last"):
            raw = self._of(name).view(np.uint8)
            self._problem(f"have an {name} that is neither 0 nor 1", self._whole & (raw > 1))
        self._first = self._of("is_first").view(np.uint8) != 0
        self._last = self._of("is_last").view(np.uint8) != 0
        both = self._whole & self._first & self._last
        self._problem("are both the first and the last of an episode", both)

    def _links(self) -> None:
        previous = self._of("previous")
        own = previous == self._tickets
        self._problem("are first ones, but follow a step", self._whole & self._first & ~own)
        older = (previous < self._tickets) & (
            self._tickets - np.minimum(previous, self._tickets) < np.uint64(self._capacity)
        )
        follow = self._whole & ~self._first
        self._problem("follow no older step of the ring", follow & ~older)
        # The step before may have been overwritten meanwhile: then its episode is partly gone.
        there = follow & older & (previous >= np.uint64(self._oldest))
        before = (previous[there] - np.uint64(self._oldest)).astype(np.int64)
        follows = np.flatnonzero(there)
        orphans = np.zeros_like(follow)
        orphans[follows[~self._whole[before]]] = True
        self._problem("follow a step that is not there", orphans)
        after_last = np.zeros_like(follow)
        after_last[follows[self._last[before] & self._whole[before]]] = True
        self._problem("follow the last step of an episode", after_last)
        successors = np.bincount(before, minlength=len(self._tickets))
        self._problem("are followed by more than one step", successors > 1)
        ends = self._whole & ~self._last & (successors == 0)
        if ends.any():
            self._report.notes.append(
                f"{int(ends.sum())} episodes have no last step: still open, or cut"
            )
        self._report.transitions = int((there & self._whole).sum()) - int(orphans.sum())
        self._report.episodes = self._whole_episodes(previous, there)

    def _whole_episodes(self, previous: NDArray[np.uint64], there: NDArray[np.bool_]) -> int:
        """Episodes with a first and a last step here: a first one's mark, carried along."""
        begins = self._whole & self._first
        if np.array_equal(previous[there] + np.uint64(1), self._tickets[there]):
            # One writer's: runs of steps that follow each other.
            start = np.where(there, 0, np.arange(len(there)))
            start = np.maximum.accumulate(start) if len(start) else start
            return int((self._last & self._whole & begins[start]).sum())
        reached = begins.copy()
        for i in np.flatnonzero(there):
            reached[i] = reached[int(previous[i]) - self._oldest]
        return int((reached & self._last & self._whole).sum())

    def _values(self) -> None:
        rewards, discounts = self._of("rewards"), self._of("discounts")
        self._problem("have a reward that is not finite", self._whole & ~np.isfinite(rewards))
        # Also where it is not a number.
        in_range = (discounts >= 0) & (discounts <= 1)
        self._problem("have a discount outside [0, 1]", self._whole & ~in_range)
        actions = self._rows("actions")
        self._problem(
            "have an action that is not finite", self._whole & ~np.isfinite(actions).all(axis=1)
        )
        states = self._rows("states")
        odd = int((self._whole & ~np.isfinite(states).all(axis=1)).sum())
        if odd:
            self._report.notes.append(f"{odd} steps have a simulator state that is not finite")
        first = self._whole & self._first
        blank = (rewards == 0) & (discounts == 1) & ~actions.any(axis=1)
        self._problem("are first ones, but have an action, reward or discount", first & ~blank)

    def _problem(self, what: str, bad: NDArray[np.bool_]) -> None:
        count = int(bad.sum())
        if count == 0:
            return
        some = np.flatnonzero(bad)[:_SHOWN]
        named = ", ".join(f"{self._tickets[i]} (slot {self._slots[i]})" for i in some)
        self._report.problems.append(
            f"{count} steps {what}: {named}" + (", ..." if count > _SHOWN else "")
        )


def _read_frames(
    file: FileIO, label: str, stamps: NDArray[np.uint64], spec: DomainSpec, report: DomainReport
) -> None:
    """Reads every frame: a mapped page that the disk cannot read would end the process."""
    nbytes = int(np.prod(spec.frame_shape))
    black, count = 0, max(1, _READ_BYTES // nbytes)
    for start in range(0, len(stamps), count):
        stop = min(start + count, len(stamps))
        written = (stamps[start:stop] != 0) & (stamps[start:stop] & _BUSY == 0)
        if not written.any():
            continue
        file.seek(HEADER_BYTES + start * nbytes)
        content = file.read((stop - start) * nbytes)
        if content is None or len(content) < (stop - start) * nbytes:
            report.problems.append(f"{label} ends before the frame of slot {stop - 1}")
            return
        frames = np.frombuffer(content, np.uint8).reshape(stop - start, nbytes)
        black += int((written & ~frames.any(axis=1)).sum())
    if black:
        report.notes.append(
            f"{black} frames are all black: so they were drawn, or a power cut took them"
        )
