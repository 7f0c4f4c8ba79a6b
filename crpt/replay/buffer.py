"""The replay buffer: one ring per domain, frames stored once, stacks made when a batch is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crpt.replay import manifest
from crpt.replay.files import FileStore
from crpt.replay.store import Array, DomainSpec, Store
from crpt.replay.writer import WhenFull, Writer

if TYPE_CHECKING:  # a process that only writes does not wait for torch
    import torch
    from torch import Tensor

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Transitions of one domain."""

    obs: Tensor  # [B, K*3, H, W], oldest frame first
    action: Tensor  # [B, A], float32
    reward: Tensor  # [B], float32
    discount: Tensor  # [B], float32: 0 where the episode terminated
    next_obs: Tensor  # [B, K*3, H, W]


class ReplayBuffer:
    """Steps of several domains, in memory or in a dataset directory.

    Any number of readers, one writer a domain. A slot is a step's place in the arrays. A transition
    is named by the slot of its second step, which holds its action, reward, discount and next
    frame. Stacks repeat an episode's first frame, and never cross episodes or the ring's seam.
    """

    def __init__(
        self, path: Path | None, stores: dict[str, Store], metadata: Mapping[str, Any]
    ) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.metadata = dict(metadata)
        self._stores = stores
        self._transitions: dict[str, tuple[tuple[int, int, int], Index]] = {}

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
        """
        metadata = dict(metadata or {})
        manifest.check_names(domains)
        if path is None:
            return cls(None, {name: Store(spec) for name, spec in domains.items()}, metadata)
        manifest.create(Path(path), domains, metadata)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> ReplayBuffer:
        """The buffer in an existing dataset directory.

        Raises:
            DatasetVersionError: the directory has another format version.
            DatasetCorruptError: a file is missing, cut short or not what it should be.
        """
        path = Path(path)
        domains, metadata = manifest.read(path)
        stores: dict[str, Store] = {
            name: FileStore(manifest.directory(path, name), spec) for name, spec in domains.items()
        }
        return cls(path, stores, metadata)

    def add_domain(self, domain: str, spec: DomainSpec) -> None:
        """Adds an empty domain; safe against other processes that add theirs at the same time."""
        manifest.check_names([domain])
        if self.path is None:
            if domain in self._stores:
                raise ValueError(f"domain should be a new one, got {domain}")
            self._stores[domain] = Store(spec)
        else:
            manifest.add_domain(self.path, domain, spec)
            self._stores[domain] = FileStore(manifest.directory(self.path, domain), spec)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self._stores)

    def spec(self, domain: str) -> DomainSpec:
        """What a step of the domain looks like; `capacity` is that of its creation."""
        return self._store(domain).spec

    def cursor(self, domain: str) -> int:
        """Steps committed so far, overwritten ones included."""
        return self._store(domain).window()[1]

    def capacity(self, domain: str) -> int:
        """Slots that the domain has now."""
        return len(self.arrays(domain)["is_first"])

    def arrays(self, domain: str) -> Mapping[str, Array]:
        """frames, actions, rewards, discounts, is_first, is_last, states: [capacity, ...].

        Read-only, and good until the domain gets longer or shorter: ask again rather than keep it.
        """
        return self._store(domain).view()

    def writer(self, domain: str, when_full: WhenFull = "overwrite") -> Writer:
        """Opens the domain for appending, from the end of its last whole episode.

        Raises:
            DatasetLockedError: it already has a writer.
        """
        store = self._store(domain)
        self._transitions.pop(domain, None)
        return Writer(store, when_full)

    def num_transitions(self, domain: str) -> int:
        return len(self.indices(domain))

    def indices(self, domain: str, *, frame_stack: int = 3) -> Index:
        """The slots of all transitions whose stacks of frames are whole, oldest first."""
        store = self._store(domain)
        key = (*store.window(), frame_stack)
        cached = self._transitions.get(domain)
        if cached is None or cached[0] != key:
            steps = np.arange(_oldest(store, frame_stack) + 1, key[1])
            slots = steps % store.capacity
            cached = (key, slots[~store.arrays["is_first"][slots]])
            self._transitions[domain] = cached
        return cached[1]

    def episodes(self, domain: str, *, frame_stack: int = 3) -> list[Index]:
        """The slots of each episode, oldest first, the last one perhaps still open.

        Of an episode that is partly overwritten, the slots whose stack of frames is still whole.
        """
        store = self._store(domain)
        slots = np.arange(_oldest(store, frame_stack), store.window()[1]) % store.capacity
        starts = np.flatnonzero(store.arrays["is_first"][slots])
        return [part for part in np.split(slots, starts) if len(part)]

    def sample(
        self,
        domain: str,
        batch_size: int,
        *,
        frame_stack: int = 3,
        pad: int = 4,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Transitions drawn uniformly with replacement, obs and next_obs each under its own shift.

        Args:
            domain: the ring to draw from.
            batch_size: B, at least 1.
            frame_stack: K, frames in an observation.
            pad: largest shift in pixels; 0: none.
            dtype: of obs and next_obs; none: uint8. Floating types are scaled to [0, 1].
            device: where the batch goes.
            generator: on the CPU; none: torch's default one.
        """
        import torch

        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got {batch_size}")
        _check_generator(generator)
        valid = self.indices(domain, frame_stack=frame_stack)
        if len(valid) == 0:
            raise ValueError(f"{domain} has no transitions to sample from")
        chosen = valid[torch.randint(len(valid), (batch_size,), generator=generator).numpy()]
        return self.gather(
            domain,
            chosen,
            frame_stack=frame_stack,
            pad=pad,
            dtype=dtype,
            device=device,
            generator=generator,
        )

    def gather(
        self,
        domain: str,
        slots: Index,
        *,
        frame_stack: int = 3,
        pad: int = 4,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> Batch:
        """The transitions of given slots, some of `indices`; otherwise like `sample`."""
        import torch

        if pad < 0:
            raise ValueError(f"pad should be at least 0, got {pad}")
        _check_generator(generator)
        store = self._store(domain)
        slots = _check_slots(store, slots)
        shifts: tuple[Tensor | None, Tensor | None] = (None, None)
        if pad > 0:
            both = torch.randint(-pad, pad + 1, (2, len(slots), 2), generator=generator)
            shifts = (both[0], both[1])
        before = (slots - 1) % store.capacity
        obs, next_obs = (
            _stacks(store, ends, frame_stack, shift, pad, dtype).to(device)
            for ends, shift in ((before, shifts[0]), (slots, shifts[1]))
        )
        action, reward, discount = (
            torch.from_numpy(store.arrays[name][slots]).to(device)
            for name in ("actions", "rewards", "discounts")
        )
        return Batch(obs, action, reward, discount, next_obs)

    def observations(
        self,
        domain: str,
        slots: Index,
        *,
        frame_stack: int = 3,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The stacks that end in given slots of `episodes`, not shifted: [N] -> [N, K*3, H, W]."""
        store = self._store(domain)
        slots = _check_slots(store, slots)
        return _stacks(store, slots, frame_stack, None, 0, dtype).to(device)

    def _store(self, domain: str) -> Store:
        if domain not in self._stores:
            raise ValueError(f"domain should be one of {list(self._stores)}, got {domain!r}")
        return self._stores[domain]


def _oldest(store: Store, frame_stack: int) -> int:
    """The oldest step whose stack is whole: a first one, or one with K - 1 before it."""
    if frame_stack < 1:
        raise ValueError(f"frame_stack should be at least 1, got {frame_stack}")
    floor, committed = store.window()
    whole = min(floor + frame_stack - 1, committed)
    for step in range(floor, whole):
        if store.arrays["is_first"][step % store.capacity]:
            return step
    return whole


def _stacks(
    store: Store,
    slots: Index,
    frame_stack: int,
    shifts: Tensor | None,
    pad: int,
    dtype: torch.dtype | None,
) -> Tensor:
    import torch

    from crpt.ops import frame_stack as stack_frames

    index = np.empty((len(slots), frame_stack), np.int64)
    index[:, -1] = slots
    for k in range(frame_stack - 2, -1, -1):
        newer = index[:, k + 1]
        is_first = store.arrays["is_first"][newer]
        index[:, k] = np.where(is_first, newer, (newer - 1) % store.capacity)
    with warnings.catch_warnings():
        # The frames are mapped read-only, and only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        frames = torch.from_numpy(np.asarray(store.arrays["frames"]))
    return stack_frames(frames, torch.from_numpy(index), shifts, pad, dtype or torch.uint8)


def _check_slots(store: Store, slots: Index) -> Index:
    slots = np.asarray(slots)
    if slots.ndim != 1 or not np.issubdtype(slots.dtype, np.integer):
        raise TypeError(
            f"slots should be a vector of ints, got {slots.dtype} of shape {list(slots.shape)}"
        )
    kept = min(store.window()[1], store.capacity)
    if len(slots) and (slots.min() < 0 or slots.max() >= kept):
        raise ValueError(f"slots should be in [0, {kept}), got {slots.min()} to {slots.max()}")
    return slots


def _check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator should be on the cpu, got {generator.device}")
