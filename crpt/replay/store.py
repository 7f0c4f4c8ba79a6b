"""The storage of one domain: its files mapped into memory, and the lock of its writers."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
from collections.abc import Mapping
from io import FileIO
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crpt.replay.core import Ring
from crpt.replay.errors import REMEDY, DatasetCorruptError, DatasetLockedError
from crpt.replay.locks import lock
from crpt.replay.memory import require_memory
from crpt.replay.npy import map_array, read_array, read_length, resize_array
from crpt.replay.places import CURSOR, EPOCH, WORD_BYTES, Place
from crpt.replay.spec import DomainSpec

Array = NDArray[Any]
Access = Literal["read", "exclusive", "shared"]

_MAP_ATTEMPTS = 5
_LOCK_SECONDS = 1.0
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it


class Store:
    """The arrays and the ring of one domain. Readers map the files read-only.

    Writers hold the lock on the cursor while they are open: an exclusive one alone, shared ones
    together. No write waits for it.

    A mapped page behind the end of its file is a fatal signal (SIGBUS). So what is read before the
    cursor is known to be sound is read as a file; the ring is mapped again where a file has another
    size; and through the mapping only slots of counted steps are read, which a writer that makes
    the files shorter leaves there. What remains is somebody else who cuts a file that is mapped,
    and arrays of `view` that are used after their domain became shorter.
    """

    def __init__(self, place: Place, spec: DomainSpec, access: Access = "read") -> None:
        self.place = place
        self.spec = spec
        self.access = access
        self._lock: FileIO | None = None
        if access != "read":
            self._lock = place.open(CURSOR, write=True)
        try:
            self._open()
        except BaseException:
            self.release()
            raise

    @property
    def capacity(self) -> int:
        """Slots that are mapped now."""
        return len(self.arrays["is_first"])

    def ring(self) -> Ring:
        """The ring, mapped again if another process made the files longer or shorter.

        Shorter, too, before anything is read: what lies behind a file's end is a fatal signal.
        """
        if self._sizes() != self._mapped_sizes:
            self._map()
        return self._ring

    def view(self) -> Mapping[str, Array]:
        """The arrays, read-only."""
        self.ring()
        views = {name: array.view() for name, array in self.arrays.items()}
        for array in views.values():
            array.flags.writeable = False
        return views

    def resize(self, capacity: int) -> None:
        """Changes the number of slots. Only while no step was overwritten, or slots would move."""
        if self.place.in_memory:
            require_memory((capacity - self.capacity) * self.spec.bytes_per_step())
        for name in self.spec.fields():
            with self.place.open(name, write=True) as file:
                resize_array(file, self.place.label(name), self.spec, name, capacity)
        self._map()

    def writable(self, *, shared: bool = False) -> Store:
        """The store to write through, locked until `release`."""
        return Store(self.place, self.spec, "shared" if shared else "exclusive")

    def populate(self) -> None:
        """Maps every page now, so that no write to memory waits for a page fault."""
        for memory in self._memory:
            with contextlib.suppress(OSError):
                memory.madvise(_MADV_POPULATE_WRITE)

    def release(self) -> None:
        """Gives the lock back, also where a child of fork has the file open."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        self.leave_to_parent()

    def leave_to_parent(self) -> None:
        """In a child of fork: closes the file, but the lock stays the parent's."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> None:
        if self.access == "read":
            self._map_what_is_plausible()
            return
        alone = self._try_lock(fcntl.LOCK_EX)
        if not alone and self.access == "exclusive":
            raise self._locked()
        if alone:
            self._map_what_is_plausible()
            # What a killed writer left in the middle; no other one is there.
            self._ring.repair()
        if self.access == "shared":
            self._lock_shared()
            self._map_what_is_plausible()

    def _lock_shared(self) -> None:
        # Another shared writer that opens just now holds the lock alone for a moment.
        deadline = time.monotonic() + _LOCK_SECONDS
        while not self._try_lock(fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise self._locked()
            time.sleep(0.001)

    def _try_lock(self, kind: int) -> bool:
        assert self._lock is not None
        return lock(self._lock.fileno(), kind | fcntl.LOCK_NB, self.place.label(CURSOR))

    def _locked(self) -> DatasetLockedError:
        return DatasetLockedError(
            f"{self.place.label(CURSOR)} says that the domain is being written by another process "
            "or another writer; wait for it, or stop it (writers opened with shared=True may be "
            "many)"
        )

    def _sizes(self) -> list[int]:
        # Of the files, not of what is mapped of them.
        return [memory.size() for memory in self._memory]

    def _map_what_is_plausible(self) -> None:
        # A writer that makes the files longer just now counts more than was mapped before.
        for attempt in range(_MAP_ATTEMPTS):
            self._map()
            with self.place.open("stamps", write=False) as file:
                stamps = read_array(file, self.spec, "stamps", self.capacity)
            if stamps is None:
                problem = f"{self.place.label('stamps')} was cut short while it was opened"
            elif self._ring.is_plausible(stamps):
                return
            else:
                problem = (
                    f"{self.place.label(CURSOR)} does not fit the stamps of its {self.capacity} "
                    f"slots ({self._ring.head()} steps counted, {np.count_nonzero(stamps)} found)"
                )
            time.sleep(0.01 * (attempt + 1 < _MAP_ATTEMPTS))
        raise DatasetCorruptError(f"{problem}; {REMEDY}")

    def _map(self) -> None:
        # A writer that makes the files shorter just now can make one look cut short.
        for _ in range(_MAP_ATTEMPTS - 1):
            try:
                self._try_to_map()
                return
            except (ValueError, DatasetCorruptError):
                time.sleep(0.01)
        self._try_to_map()

    def _try_to_map(self) -> None:
        write = self.access != "read"
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(self.place.open(name, write=write))
                for name in (*self.spec.fields(), CURSOR, EPOCH)
            }
            # Before the lengths: what changes from now on is found by the next look at the sizes.
            sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
            # Where a resize was cut short the files differ; what was committed is in all of them.
            capacity = min(
                read_length(files[name], self.place.label(name), self.spec, name)
                for name in self.spec.fields()
            )
            mapped = {
                name: map_array(files[name], self.spec, name, capacity, write=write)
                for name in self.spec.fields()
            }
            head, epoch = (self._map_word(name, files[name], write) for name in (CURSOR, EPOCH))
        self.arrays: dict[str, Array] = {name: array for name, (array, _) in mapped.items()}
        in_files = {name: memory for name, (_, memory) in mapped.items() if memory is not None}
        self._memory = list(in_files.values())
        self._mapped_sizes = [sizes[name] for name in in_files]
        self._ring = Ring({**self.arrays, "head": head, "epoch": epoch})

    def _map_word(self, name: str, file: FileIO, write: bool) -> Array:
        size = self.place.size(name)
        if size != WORD_BYTES:
            raise DatasetCorruptError(
                f"{self.place.label(name)} should have {WORD_BYTES} bytes, got {size}; {REMEDY}"
            )
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
        return np.frombuffer(mmap.mmap(file.fileno(), WORD_BYTES, access=access), "<u8")
