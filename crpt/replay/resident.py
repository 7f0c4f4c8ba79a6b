"""A copy of domains whose frames are on a GPU, and are gathered there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crpt.replay.batch import Batch, Views, empty_batch
from crpt.replay.core import Ring
from crpt.replay.errors import NotEnoughMemoryError, megabytes
from crpt.replay.gather import Rows, call
from crpt.replay.memory import require_memory
from crpt.replay.sampling import Samples, draw_seed, require_at_least
from crpt.replay.spec import DomainSpec
from crpt.replay.store import Store

_COPIED_AT_ONCE = 1 << 26  # bytes


class ResidentCopy(Samples):
    """What some domains held when it was made; draws the same batches as they did then."""

    def __init__(self, stores: Mapping[str, Store], device: torch.device) -> None:
        self.device = device
        filled = {name: _filled(store) for name, store in stores.items()}
        _require_room(
            sum(slots * _frame_bytes(stores[name].spec) for name, slots in filled.items()), device
        )
        self._specs_by_name = {name: store.spec for name, store in stores.items()}
        self._frames: dict[str, Tensor] = {}
        self._rings: dict[str, Ring] = {}
        for name, store in stores.items():
            self._frames[name], self._rings[name] = _copy(store, filled[name], device)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self._rings)

    def spec(self, domain: str) -> DomainSpec:
        if domain not in self._specs_by_name:
            raise ValueError(f"domain should be one of {list(self.domains)}, got {domain!r}")
        return self._specs_by_name[domain]

    def num_transitions(self, domain: str, *, frame_stack: int = 3, n_step: int = 1) -> int:
        self.spec(domain)
        require_at_least("frame_stack", frame_stack, 1)
        require_at_least("n_step", n_step, 1)
        return len(self._rings[domain].transitions(n_step, frame_stack))

    def frames(self, domain: str) -> Tensor:
        """The frames by slot, uint8 [N, C, H, W], on the device."""
        self.spec(domain)
        return self._frames[domain]

    def draw(
        self,
        domain: str,
        index: Tensor,
        shifts: Tensor,
        *,
        pad: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        """What `sample` would draw, before the device has work with it.

        `frame_stack(frames(domain), index[i], shifts[i], pad, dtype)` then is obs for i = 0 and
        next_obs for i = 1 of the batch that `sample` makes from the same generator.

        Args:
            index: int64 [2, B, K], contiguous, on the CPU, pinned or not; written: slots of frames.
            shifts: int64 [2, B, 2], likewise; written, unless pad is 0: (dy, dx).
            domain, pad, generator: as of `sample`.
        """
        for name, tensor in (("index", index), ("shifts", shifts)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} should be a Tensor, got {type(tensor).__name__}")
            if tensor.dtype != torch.int64:
                raise TypeError(f"{name} should be torch.int64, got {tensor.dtype}")
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError(
                    f"{name} should be contiguous and on the cpu, got strides {tensor.stride()} on "
                    f"{tensor.device}"
                )
        if index.dim() != 3 or len(index) != 2:
            raise ValueError(f"index should be [2, B, K], got {list(index.shape)}")
        _, count, stack = index.shape
        if tuple(shifts.shape) != (2, count, 2):
            raise ValueError(f"shifts should be {[2, count, 2]}, got {list(shifts.shape)}")
        views = Views.of(stack, pad, None, 1, None)
        like = empty_batch({domain: self.spec(domain)}, count, views, device=torch.device("meta"))
        rows = Rows(domain, 0, count, draw_seed(generator))
        # One thread: the numbers alone are less work than waking others.
        self._draw(_on_host(like, rows), rows, views, 1, index, shifts)

    @property
    def _own_device(self) -> torch.device:
        return self.device

    def _fill(self, batch: Batch, rows: Rows, views: Views, threads: int) -> None:
        from crpt.ops import frame_stack

        count = rows.end - rows.begin
        scalars = _on_host(batch, rows)
        index = torch.empty((2, count, views.frame_stack), dtype=torch.int64, device="cpu")
        shifts = torch.empty((2, count, 2), dtype=torch.int64, device="cpu")
        own_rows = Rows(rows.domain, 0, count, rows.seed, rows.slots, rows.first)
        self._draw(scalars, own_rows, views, threads, index, shifts)
        where = slice(rows.begin, rows.end)
        index, shifts = index.to(self.device), shifts.to(self.device)
        frames = self._frames[rows.domain]
        for i, target in enumerate((batch.obs, batch.next_obs)):
            shift = shifts[i] if views.pad > 0 else None
            target[where] = frame_stack(frames, index[i], shift, views.pad, views.dtype)
        for name in ("action", "reward", "discount"):
            getattr(batch, name)[where] = getattr(scalars, name).to(self.device)

    def _draw(
        self, scalars: Batch, rows: Rows, views: Views, threads: int, index: Tensor, shifts: Tensor
    ) -> None:
        call(
            self._rings[rows.domain], scalars, rows, views, threads,
            obs_index=index[0].data_ptr(), next_index=index[1].data_ptr(),
            shifts=shifts.data_ptr(),
        )  # fmt: skip


def _on_host(batch: Batch, rows: Rows) -> Batch:
    """A batch for the scalars of these rows."""
    count, nothing = rows.end - rows.begin, torch.empty(0, device="cpu")
    return Batch(
        obs=nothing,
        action=torch.empty((count, *batch.action.shape[1:]), device="cpu"),
        reward=torch.empty(count, device="cpu"),
        discount=torch.empty(count, device="cpu"),
        next_obs=nothing,
        domain=nothing,
        domains=batch.domains,
        widths=batch.widths,
    )


def _copy(store: Store, filled: int, device: torch.device) -> tuple[Tensor, Ring]:
    ring = store.ring()
    epoch, head = ring.epoch(), ring.head()
    stamps = ring.copy_stamps(filled)
    # Only what steps were counted in: a writer may make the files shorter behind them.
    copies: dict[str, Any] = {
        name: _copy_rows(array, filled)
        for name, array in store.arrays.items()
        if name not in ("frames", "stamps")
    }
    frames = _copy_frames(store.arrays["frames"][:filled], device)
    # What was overwritten meanwhile is left out.
    copies["stamps"] = ring.still_there(stamps, epoch)
    copies["head"] = np.array([head], np.uint64)
    copies["epoch"] = np.zeros(1, np.uint64)
    # The ring wants the frames' shape alone: their mapping is never read.
    return frames, Ring({**copies, "frames": store.arrays["frames"]})


def _copy_rows(array: np.ndarray[Any, Any], filled: int) -> np.ndarray[Any, Any]:
    copy = np.zeros_like(array)
    copy[:filled] = array[:filled]
    return copy


def _copy_frames(frames: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    copy = torch.empty(frames.shape, dtype=torch.uint8, device=device)
    rows = max(1, _COPIED_AT_ONCE // max(1, frames[:1].nbytes))
    with warnings.catch_warnings():
        # The frames are mapped read-only, and only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for begin in range(0, len(frames), rows):
            part = torch.from_numpy(frames[begin : begin + rows])
            copy[begin : begin + rows].copy_(part)
    return copy


def _filled(store: Store) -> int:
    return max(1, min(store.ring().head(), store.capacity))


def _frame_bytes(spec: DomainSpec) -> int:
    return int(np.prod(spec.frame_shape))


def _require_room(nbytes: int, device: torch.device) -> None:
    if device.type == "cpu":
        require_memory(nbytes, "the copy")
    elif device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if nbytes > free:
            raise NotEnoughMemoryError(
                f"the copy needs {megabytes(nbytes)} of {device}, but {megabytes(free)} are free; "
                "name fewer domains, or sample from the buffer itself"
            )
