"""Reading rows of a batch out of a compiled ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crpt.replay.core import Ring
from crpt.replay.errors import OverwrittenError

if TYPE_CHECKING:  # a process that only writes does not wait for torch
    from torch import Tensor

    from crpt.replay.batch import Batch, Views

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows [begin, end) of a batch: transitions of one domain, drawn, or those of given slots."""

    domain: str
    begin: int
    end: int
    seed: int
    slots: Index | None = None
    first: int = 0
    """Of what is drawn from the domain with this seed, the number of the first of these rows."""


def gather(ring: Ring, batch: Batch, rows: Rows, views: Views, threads: int) -> None:
    """Rows of a batch on the CPU, frames included."""
    place = {"obs": address(batch.obs, rows.begin), "next_obs": address(batch.next_obs, rows.begin)}
    call(ring, batch, rows, views, threads, **place)


def call(
    ring: Ring,
    batch: Batch,
    rows: Rows,
    views: Views,
    threads: int,
    *,
    obs: int = 0,
    next_obs: int = 0,
    obs_index: int = 0,
    next_index: int = 0,
    shifts: int = 0,
) -> None:
    """The scalars of rows, and what has an address."""
    import torch

    from crpt.replay.batch import DTYPES

    action, count = batch.action, rows.end - rows.begin
    width = ring_width(action)
    if len(batch.widths) > 1:
        action[rows.begin : rows.end, batch.widths[batch.domains.index(rows.domain)] :] = 0
    uint8 = views.dtype is torch.uint8
    status, row = ring.sample(
        0 if rows.slots is None else rows.slots.ctypes.data, rows.seed, rows.first, count,
        views.frame_stack, views.n_step, views.gamma, views.pad, views.dtype.itemsize,
        0 if uint8 else DTYPES[views.dtype], obs, next_obs, address(action, rows.begin), width,
        address(batch.reward, rows.begin), address(batch.discount, rows.begin), obs_index,
        next_index, shifts, threads,
    )  # fmt: skip
    raise_unless_done(status, row, rows.domain, rows.slots, views.frame_stack, views.n_step)


def ring_width(action: Tensor) -> int:
    """Numbers from one row to the next."""
    return action.stride(0) if action.dim() > 1 else 1


def address(tensor: Tensor, row: int) -> int:
    return tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()


def raise_unless_done(
    status: str, row: int, domain: str, slots: Index | None, frame_stack: int, n_step: int
) -> None:
    if status == "done":
        return
    what = f"{frame_stack} stacked frames" + (f" and {n_step} steps" if n_step > 1 else "")
    if status == "empty":
        raise ValueError(f"{domain} has no transitions to sample from, of {what}")
    if status == "not_whole":
        assert slots is not None
        raise ValueError(
            f"slots should hold whole ones of {domain} with {what}, got {slots[row]} at [{row}], "
            "which does not, or no longer"
        )
    if status == "overrun":
        raise OverwrittenError(
            f"{domain} is overwritten faster than its steps can be read; give it more capacity"
        )
    raise MemoryError(f"no memory to gather a batch of {domain}")
