"""The replay buffer: one ring per domain, frames stored once, stacks made when a batch is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crpt.replay import manifest
from crpt.replay.gather import Index, Rows, gather, raise_unless_done
from crpt.replay.memory import require_memory
from crpt.replay.places import Directory, Memory, create_memory
from crpt.replay.sampling import Samples, draw_seed, num_threads, send
from crpt.replay.spec import DomainSpec
from crpt.replay.store import Array, Store
from crpt.replay.writer import WhenFull, Writer

if TYPE_CHECKING:  # a process that only writes does not wait for torch
    import torch
    from torch import Tensor

    from crpt.replay.batch import Batch, Views
    from crpt.replay.resident import ResidentCopy


class ReplayBuffer(Samples):
    """Steps of several domains, in memory or in a dataset directory.

    Any number of processes may sample, and any number write: they open the directory, or are sent
    the buffer, for one in memory shares it with those that it is sent to (multiprocessing, spawn).

    A slot is a step's place in the arrays. A transition is named by the slot of its last step,
    which holds its next frame, and for one step its action, reward and discount. Stacks repeat an
    episode's first frame, and never cross episodes or the ring's seam.
    """

    def __init__(
        self, path: Path | None, stores: dict[str, Store], metadata: Mapping[str, Any]
    ) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.metadata = dict(metadata)
        self._stores = stores
        self._transitions: dict[str, tuple[tuple[int, ...], Index]] = {}

    @classmethod
    def create(
        cls,
        path: str | Path | None,
        domains: Mapping[str, DomainSpec],
        metadata: Mapping[str, Any] | None = None,
    ) -> ReplayBuffer:
        """A new, empty buffer: a dataset directory at `path`, or in memory if it is none.

        Raises:
            FileExistsError: there is something at `path` already.
            DatasetFullError: the disk has no room for all the slots.
            NotEnoughMemoryError: memory has none.
        """
        metadata = dict(metadata or {})
        manifest.check_names(domains)
        if path is not None:
            manifest.create(Path(path), domains, metadata)
            return cls.open(path)
        require_memory(sum(spec.capacity * spec.bytes_per_step() for spec in domains.values()))
        stores = {name: Store(create_memory(spec), spec) for name, spec in domains.items()}
        return cls(None, stores, metadata)

    @classmethod
    def open(cls, path: str | Path) -> ReplayBuffer:
        """The buffer in an existing dataset directory.

        Raises:
            DatasetVersionError: the directory has another format version.
            DatasetCorruptError: a file is missing, cut short or not what it should be.
        """
        path = Path(path)
        domains, metadata = manifest.read(path)
        stores = {
            name: Store(Directory(manifest.directory(path, name)), spec)
            for name, spec in domains.items()
        }
        return cls(path, stores, metadata)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is not None:
            return ReplayBuffer.open, (self.path,)
        places = {name: (store.place, store.spec) for name, store in self._stores.items()}
        return _received, (places, self.metadata)

    def add_domain(self, domain: str, spec: DomainSpec) -> None:
        """Adds an empty domain; safe against other processes that add theirs at the same time."""
        manifest.check_names([domain])
        if self.path is None:
            if domain in self._stores:
                raise ValueError(f"domain should be a new one, got {domain}")
            self._stores[domain] = Store(create_memory(spec), spec)
        else:
            manifest.add_domain(self.path, domain, spec)
            self._stores[domain] = Store(Directory(manifest.directory(self.path, domain)), spec)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self._stores)

    def spec(self, domain: str) -> DomainSpec:
        """What a step of the domain looks like; `capacity` is that of its creation."""
        return self._store(domain).spec

    def cursor(self, domain: str) -> int:
        """Steps counted so far, overwritten ones included. An exclusive writer has committed all of
        them; shared ones may be writing the newest, and leave a gap where one died."""
        return self._store(domain).ring().head()

    def capacity(self, domain: str) -> int:
        """Slots that the domain has now."""
        return len(self.arrays(domain)["is_first"])

    def arrays(self, domain: str) -> Mapping[str, Array]:
        """The arrays of `DomainSpec.fields` by name: [capacity, ...].

        Read-only, and good until the domain gets longer or shorter: ask again rather than keep it.
        """
        return self._store(domain).view()

    def writer(
        self, domain: str, when_full: WhenFull = "overwrite", *, shared: bool = False
    ) -> Writer:
        """Opens the domain for appending.

        Args:
            domain: any number of domains may be written at once.
            when_full: overwrite the oldest steps, or grow.
            shared: one of any number of writers, rather than the only one.

        Raises:
            DatasetLockedError: it has a writer that excludes this one.
        """
        return Writer(self._store(domain), when_full, shared)

    def num_transitions(self, domain: str, *, frame_stack: int = 3, n_step: int = 1) -> int:
        return len(self.indices(domain, frame_stack=frame_stack, n_step=n_step))

    def indices(self, domain: str, *, frame_stack: int = 3, n_step: int = 1) -> Index:
        """The slots of all transitions whose stacks of frames are whole, oldest first."""
        _require_counts(frame_stack, n_step)
        ring = self._store(domain).ring()
        key = (ring.head(), ring.epoch(), frame_stack, n_step)
        cached = self._transitions.get(domain)
        if cached is not None and cached[0] == key:
            return cached[1]
        found = ring.transitions(n_step, frame_stack)
        found.flags.writeable = False
        # A step that is being written now will be there without a change of the key.
        if ring.count_whole() == min(key[0], self._store(domain).capacity):
            self._transitions[domain] = (key, found)
        return found

    def episodes(self, domain: str, *, frame_stack: int = 3) -> list[Index]:
        """The slots of each episode, oldest first, some perhaps still open or cut.

        Of an episode that is partly overwritten, the slots whose stack of frames is still whole.
        """
        _require_counts(frame_stack, 1)
        slots, number = self._store(domain).ring().episodes(frame_stack)
        order = np.argsort(number, kind="stable")  # shared writers' steps lie between each other
        starts = np.flatnonzero(np.diff(number[order])) + 1
        return [part for part in np.split(slots[order], starts) if len(part)]

    def gather(
        self,
        domain: str,
        slots: Index,
        *,
        n_step: int = 1,
        gamma: float | None = None,
        frame_stack: int = 3,
        pad: int = 4,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        out: Batch | None = None,
    ) -> Batch:
        """The transitions of given slots, some of `indices`; otherwise like `sample`."""
        from crpt.replay.batch import Views

        views = Views.of(frame_stack, pad, dtype, n_step, gamma)
        store = self._store(domain)
        slots = _check_slots(store, slots)
        batch, to = self._where_to({domain: store.spec}, len(slots), views, device, out)
        batch.domain.zero_()
        rows = Rows(domain, 0, len(slots), draw_seed(generator), slots)
        self._fill(batch, rows, views, num_threads())
        return send(batch, to)

    def observations(
        self,
        domain: str,
        slots: Index,
        *,
        frame_stack: int = 3,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The stacks that end in given slots of `episodes`, not shifted: [N] -> [N, K*C, H, W]."""
        import torch

        from crpt.replay.batch import DTYPES, Views, empty_stacks

        views = Views.of(frame_stack, 0, dtype, 1, None)
        store = self._store(domain)
        slots = _check_slots(store, slots)
        out = empty_stacks(store.spec, len(slots), views)
        status, row = store.ring().sample(
            slots.ctypes.data, 0, 0, len(slots), frame_stack, 0, 1.0, 0, views.dtype.itemsize,
            DTYPES.get(views.dtype, 0), out.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, num_threads(),
        )  # fmt: skip
        raise_unless_done(status, row, domain, slots, frame_stack, 1)
        return out.to(torch.device(device))

    def resident(
        self, device: torch.device | str, domains: Iterable[str] | None = None
    ) -> ResidentCopy:
        """A copy of the domains, all if none are named, whose frames are on a device.

        Raises NotEnoughMemoryError if they do not fit.
        """
        import torch

        from crpt.replay.resident import ResidentCopy

        names = self.domains if domains is None else tuple(domains)
        return ResidentCopy({name: self._store(name) for name in names}, torch.device(device))

    def _fill(self, batch: Batch, rows: Rows, views: Views, threads: int) -> None:
        gather(self._store(rows.domain).ring(), batch, rows, views, threads)

    def _store(self, domain: str) -> Store:
        if domain not in self._stores:
            raise ValueError(f"domain should be one of {list(self._stores)}, got {domain!r}")
        return self._stores[domain]


def _received(
    places: Mapping[str, tuple[Memory, DomainSpec]], metadata: Mapping[str, Any]
) -> ReplayBuffer:
    stores = {name: Store(place, spec) for name, (place, spec) in places.items()}
    return ReplayBuffer(None, stores, metadata)


def _require_counts(frame_stack: int, n_step: int) -> None:
    for name, value in (("frame_stack", frame_stack), ("n_step", n_step)):
        if value < 1:
            raise ValueError(f"{name} should be at least 1, got {value}")


def _check_slots(store: Store, slots: Index) -> Index:
    slots = np.asarray(slots)
    if slots.ndim != 1 or not np.issubdtype(slots.dtype, np.integer):
        raise TypeError(
            f"slots should be a vector of ints, got {slots.dtype} of shape {list(slots.shape)}"
        )
    kept = min(store.ring().head(), store.capacity)
    if len(slots) and (slots.min() < 0 or slots.max() >= kept):
        raise ValueError(f"slots should be in [0, {kept}), got {slots.min()} to {slots.max()}")
    return np.ascontiguousarray(slots, np.int64)
