"""The storage of one domain in files: plain .npy arrays, mapped into memory, and a cursor."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from crpt.replay.errors import (
    DatasetCorruptError,
    DatasetFullError,
    DatasetLockedError,
    megabytes,
)
from crpt.replay.store import COMMITTED, CURSOR_WORDS, FLOOR, SEALED, Array, DomainSpec, Store

# numpy pads its header so that the first axis can grow in place.
_HEADER_BYTES = 128
_MAP_ATTEMPTS = 5
_CURSOR_BYTES = 8 * CURSOR_WORDS
_REMEDY = "restore it from a copy, or remove the dataset and collect it again"


def create_files(directory: Path, spec: DomainSpec) -> None:
    """Makes the files of an empty domain, with room on the disk for its whole capacity."""
    directory.mkdir()
    for name in spec.fields():
        with open(directory / f"{name}.npy", "xb+", buffering=0) as file:
            _resize_array(file, spec, name, spec.capacity)
    (directory / "cursor").write_bytes(bytes(_CURSOR_BYTES))


class FileStore(Store):
    """The arrays and the cursor of one domain, mapped from its directory. Readers map read-only."""

    def __init__(self, directory: Path, spec: DomainSpec, *, write: bool = False) -> None:
        self.spec = spec
        self._directory = directory
        self._mode: Any = "r+" if write else "r"
        self._lock: BinaryIO | None = _lock(directory / "cursor") if write else None
        try:
            self._map_what_the_cursor_commits()
        except BaseException:
            self.release()
            raise

    def window(self) -> tuple[int, int]:
        floor, committed = super().window()
        if floor == 0 and committed > self.capacity:  # another process made the files longer
            self._map()
            floor, committed = super().window()
            if floor == 0:  # and longer again since
                committed = min(committed, self.capacity)
        return floor, committed

    def view(self) -> Mapping[str, Array]:
        if self._size() != self._mapped_size:  # another process made the files longer or shorter
            self._map()
        return super().view()

    def resize(self, capacity: int) -> None:
        for name in self.spec.fields():
            with open(self._directory / f"{name}.npy", "rb+", buffering=0) as file:
                _resize_array(file, self.spec, name, capacity)
        self._map()

    def writable(self) -> Store:
        return FileStore(self._directory, self.spec, write=True)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _size(self) -> int:
        return (self._directory / "is_first.npy").stat().st_size

    def _map(self) -> None:
        # A writer that makes the files shorter just now can make one look cut short.
        for _ in range(_MAP_ATTEMPTS - 1):
            try:
                self._try_to_map()
                return
            except (ValueError, DatasetCorruptError):
                time.sleep(0.01)
        self._try_to_map()

    def _map_what_the_cursor_commits(self) -> None:
        # A writer that makes the files longer just now commits more than was mapped before.
        for _ in range(_MAP_ATTEMPTS - 1):
            self._map()
            try:
                self._check_cursor()
                return
            except DatasetCorruptError:
                time.sleep(0.01)
        self._map()
        self._check_cursor()

    def _try_to_map(self) -> None:
        files = {name: self._directory / f"{name}.npy" for name in self.spec.fields()}
        # Where a resize was cut short the files differ; what was committed is in all of them.
        capacity = min(_read_length(path, self.spec, name) for name, path in files.items())
        self.arrays = {
            name: self._map_array(files[name], capacity, dtype, shape)
            for name, (dtype, shape) in self.spec.fields().items()
        }
        self._mapped_size = self._size()
        cursor = self._directory / "cursor"
        if not cursor.is_file() or cursor.stat().st_size != _CURSOR_BYTES:
            raise DatasetCorruptError(f"{cursor} should have {_CURSOR_BYTES} bytes; {_REMEDY}")
        self.cursor = np.memmap(cursor, np.dtype("<u8"), self._mode, shape=(CURSOR_WORDS,))

    def _map_array(
        self, path: Path, capacity: int, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any]:
        if 0 in shape:
            return np.zeros((capacity, *shape), dtype)
        return np.memmap(path, dtype, self._mode, _HEADER_BYTES, (capacity, *shape))

    def _check_cursor(self) -> None:
        committed, sealed, floor = (int(self.cursor[word]) for word in (COMMITTED, SEALED, FLOOR))
        if sealed > committed + 1 or abs(committed - floor) > self.capacity:
            raise DatasetCorruptError(
                f"{self._directory / 'cursor'} does not fit its arrays of {self.capacity} steps "
                f"(committed {committed}, sealed {sealed}, floor {floor}); {_REMEDY}"
            )


def _lock(cursor: Path) -> BinaryIO:
    try:
        file = open(cursor, "rb+", buffering=0)  # noqa: SIM115, closed by release()
    except FileNotFoundError:
        raise DatasetCorruptError(f"{cursor} is missing; {_REMEDY}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DatasetLockedError(
            f"{cursor.parent} is being written by another process or another writer; "
            "wait for it, or stop it"
        ) from None
    return file


def _header(spec: DomainSpec, name: str, capacity: int) -> bytes:
    dtype, shape = spec.fields()[name]
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (capacity, *shape),
        },
    )
    header = buffer.getvalue()
    if len(header) != _HEADER_BYTES:
        raise ValueError(f"{name} should have fewer dimensions, got a slot of shape {list(shape)}")
    return header


def _read_length(path: Path, spec: DomainSpec, name: str) -> int:
    """Slots of an array, after checking its header and its size against the domain's geometry."""
    dtype, shape = spec.fields()[name]
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DatasetCorruptError(f"{path} is missing; {_REMEDY}") from None
    try:
        stream = io.BytesIO(header)
        np.lib.format.read_magic(stream)
        got_shape, _, got_dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise DatasetCorruptError(f"{path} is not a .npy file ({error}); {_REMEDY}") from None
    capacity = got_shape[0] if got_shape else 0
    if header != _header(spec, name, capacity):
        raise DatasetCorruptError(
            f"{path} should hold {dtype} of shape {[capacity, *shape]}, "
            f"got {got_dtype} of shape {list(got_shape)}; {_REMEDY}"
        )
    needed = _HEADER_BYTES + capacity * _slot_bytes(spec, name)
    if size < needed:
        raise DatasetCorruptError(
            f"{path} is cut short: it should have {needed} bytes, got {size}; {_REMEDY}"
        )
    return capacity


def _slot_bytes(spec: DomainSpec, name: str) -> int:
    dtype, shape = spec.fields()[name]
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _resize_array(file: BinaryIO, spec: DomainSpec, name: str, capacity: int) -> None:
    """Gives the array `capacity` slots; a kill on the way leaves the old length or the new one."""
    size = _HEADER_BYTES + capacity * _slot_bytes(spec, name)
    header = _header(spec, name, capacity)
    have = os.fstat(file.fileno()).st_size
    with _disk_full_explained(file, size - have):
        if size >= have:
            # A hole in the file would turn a full disk into a fatal signal at some later store.
            _allocate(file, have, size)
        os.pwrite(file.fileno(), header, 0)
        if size < have:
            os.ftruncate(file.fileno(), size)


def _allocate(file: BinaryIO, start: int, stop: int) -> None:
    if stop == start:
        return
    try:
        os.posix_fallocate(file.fileno(), start, stop - start)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        zeros = bytes(1 << 20)
        for offset in range(start, stop, len(zeros)):
            os.pwrite(file.fileno(), zeros[: stop - offset], offset)


@contextlib.contextmanager
def _disk_full_explained(file: BinaryIO, nbytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(Path(file.name).parent).free
        raise DatasetFullError(
            f"no room on the disk for {megabytes(nbytes)} more of {file.name} "
            f"({megabytes(free)} free); what was committed is whole: make room and run the same "
            "command again"
        ) from error
