"""Where the files of one domain are: in a directory, or nameless in memory. Otherwise the same."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable
from io import FileIO
from multiprocessing import reduction
from pathlib import Path
from typing import Any, Protocol

from crpt.replay.errors import REMEDY, DatasetCorruptError, DatasetError
from crpt.replay.memory import require_memory
from crpt.replay.npy import resize_array
from crpt.replay.spec import DomainSpec

CURSOR, EPOCH = "cursor", "epoch"
WORD_BYTES = 8


class Place(Protocol):
    in_memory: bool

    def label(self, name: str) -> str:
        """How errors call the file of an array, or the cursor, or the epoch."""

    def open(self, name: str, *, write: bool) -> FileIO: ...

    def size(self, name: str) -> int: ...


class Directory:
    """The files `<name>.npy`, `cursor` and `epoch` of a directory."""

    in_memory = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def _file(self, name: str) -> Path:
        return self._path / (name if name in (CURSOR, EPOCH) else f"{name}.npy")

    def label(self, name: str) -> str:
        return str(self._file(name))

    def open(self, name: str, *, write: bool) -> FileIO:
        try:
            return FileIO(self._file(name), "r+" if write else "r")
        except (FileNotFoundError, NotADirectoryError):
            raise DatasetCorruptError(f"{self.label(name)} is missing; {REMEDY}") from None
        except OSError as error:
            how = "written" if write else "read"
            raise DatasetError(f"{self.label(name)} cannot be {how} ({error.strerror})") from error

    def size(self, name: str) -> int:
        return self._file(name).stat().st_size


class Memory:
    """Files without a name, which live as long as a process has them open or mapped.

    Sending it to a spawned process sends the open files, so both have the same steps.
    """

    in_memory = True

    def __init__(self, descriptors: dict[str, int]) -> None:
        self._descriptors = descriptors
        weakref.finalize(self, _close_all, tuple(descriptors.values()))

    def label(self, name: str) -> str:
        return f"the {name} in memory"

    def open(self, name: str, *, write: bool) -> FileIO:
        # Opened afresh rather than duplicated: locks belong to what open() makes.
        return FileIO(f"/proc/self/fd/{self._descriptors[name]}", "r+" if write else "r")

    def size(self, name: str) -> int:
        return os.fstat(self._descriptors[name]).st_size

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, ({name: reduction.DupFd(fd) for name, fd in self._descriptors.items()},)


def _received(sent: dict[str, Any]) -> Memory:
    descriptors = {name: part.detach() for name, part in sent.items()}
    for descriptor in descriptors.values():
        os.set_inheritable(descriptor, False)
    return Memory(descriptors)


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def create_directory(path: Path, spec: DomainSpec) -> None:
    """Makes the files of an empty domain, with room on the disk for its whole capacity."""
    path.mkdir()
    for name in spec.fields():
        with FileIO(path / f"{name}.npy", "x+") as file:
            resize_array(file, file.name, spec, name, spec.capacity)
    for name in (CURSOR, EPOCH):
        (path / name).write_bytes(bytes(WORD_BYTES))


def create_memory(spec: DomainSpec) -> Memory:
    """The same in memory, all of it allocated: what fits now does not fail later."""
    require_memory(spec.capacity * spec.bytes_per_step())
    place = Memory({name: _nameless(name) for name in (*spec.fields(), CURSOR, EPOCH)})
    for name in spec.fields():
        with place.open(name, write=True) as file:
            resize_array(file, place.label(name), spec, name, spec.capacity)
    for name in (CURSOR, EPOCH):
        with place.open(name, write=True) as file:
            file.write(bytes(WORD_BYTES))
    return place


def _nameless(name: str) -> int:
    try:
        return os.memfd_create(f"crpt-{name}", os.MFD_CLOEXEC)
    except (OSError, AttributeError):  # an old or a locked-down kernel
        descriptor, path = tempfile.mkstemp(prefix="crpt-")
        os.unlink(path)
        return descriptor
