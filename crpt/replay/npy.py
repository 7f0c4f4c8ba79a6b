"""One array of a domain as a plain .npy file: its header, its length, and room on the disk."""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import shutil
from collections.abc import Iterator
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crpt.files import NO_ROOM
from crpt.replay.errors import REMEDY, DatasetCorruptError, DatasetFullError, megabytes
from crpt.replay.spec import DomainSpec

# numpy pads its header so that the first axis can grow in place.
HEADER_BYTES = 128


def read_length(file: FileIO, label: str, spec: DomainSpec, name: str) -> int:
    """Slots of an array, after checking its header and its size against the domain's geometry."""
    dtype, shape = spec.fields()[name]
    header = os.pread(file.fileno(), HEADER_BYTES, 0)
    size = os.fstat(file.fileno()).st_size
    try:
        stream = io.BytesIO(header)
        np.lib.format.read_magic(stream)
        got_shape, _, got_dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # numpy parses it as Python, and fails in as many ways
        raise DatasetCorruptError(f"{label} is not a .npy file ({error}); {REMEDY}") from None
    capacity = got_shape[0] if got_shape else 0
    if capacity < 1 or header != _header(spec, name, capacity):
        raise DatasetCorruptError(
            f"{label} should hold {dtype} of shape {[max(capacity, 1), *shape]}, "
            f"got {got_dtype} of shape {list(got_shape)}; {REMEDY}"
        )
    needed = HEADER_BYTES + capacity * _slot_bytes(spec, name)
    if size < needed:
        raise DatasetCorruptError(
            f"{label} is cut short: it should have {needed} bytes, got {size}; {REMEDY}"
        )
    return capacity


def map_array(
    file: FileIO, spec: DomainSpec, name: str, capacity: int, *, write: bool
) -> tuple[NDArray[Any], mmap.mmap | None]:
    """The first `capacity` slots of an array, and their memory if there is any."""
    dtype, shape = spec.fields()[name]
    if 0 in shape:
        return np.zeros((capacity, *shape), dtype), None
    memory = mmap.mmap(
        file.fileno(),
        HEADER_BYTES + capacity * _slot_bytes(spec, name),
        access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ,
    )
    return np.ndarray((capacity, *shape), dtype, memory, HEADER_BYTES), memory


def read_array(file: FileIO, spec: DomainSpec, name: str, capacity: int) -> NDArray[Any] | None:
    """A copy of the first `capacity` slots, by reading; none if the file ends before."""
    dtype, shape = spec.fields()[name]
    nbytes = capacity * _slot_bytes(spec, name)
    copy = bytearray()
    while len(copy) < nbytes:
        part = os.pread(file.fileno(), nbytes - len(copy), HEADER_BYTES + len(copy))
        if not part:
            return None
        copy += part
    return np.frombuffer(copy, dtype).reshape(capacity, *shape)


def resize_array(file: FileIO, label: str, spec: DomainSpec, name: str, capacity: int) -> None:
    """Gives the array `capacity` slots; a kill on the way leaves the old length or the new one."""
    size = HEADER_BYTES + capacity * _slot_bytes(spec, name)
    header = _header(spec, name, capacity)
    have = os.fstat(file.fileno()).st_size
    with _full_explained(label, size - have):
        if size >= have:
            # A hole in the file would turn a full disk into a fatal signal at some later store.
            _allocate(file, have, size)
        os.pwrite(file.fileno(), header, 0)
        if size < have:
            os.ftruncate(file.fileno(), size)


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
    if len(header) != HEADER_BYTES:
        raise ValueError(f"{name} should have fewer dimensions, got a slot of shape {list(shape)}")
    return header


def _slot_bytes(spec: DomainSpec, name: str) -> int:
    dtype, shape = spec.fields()[name]
    return dtype.itemsize * prod(shape)


def _allocate(file: FileIO, start: int, stop: int) -> None:
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
def _full_explained(label: str, nbytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (*NO_ROOM, errno.ENOMEM):
            raise
        free = ""
        if (folder := Path(label).parent).is_dir():
            free = f" ({megabytes(shutil.disk_usage(folder).free)} free)"
        raise DatasetFullError(
            f"no room for {megabytes(nbytes)} more of {label}{free}; what was committed is whole: "
            "make room and run the same command again"
        ) from error
