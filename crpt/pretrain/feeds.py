"""How the views of an update come to a GPU: gathered from frames that lie there, or sent ahead."""

from __future__ import annotations

import gc
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crpt.ops import frame_stack
from crpt.replay import ReplayBuffer

Domains = tuple[str, ...]

# Batches whose numbers may wait for the device before the host does.
AHEAD = 4
# Of the memory that is free, frames may take so much; the rest is for the updates.
RESIDENT_SHARE = 0.7


@dataclass(frozen=True)
class Part:
    """Rows [begin, end) of a batch, of one domain."""

    domain: str
    begin: int
    end: int

    def of(self, rows: slice) -> slice:
        """Those of the part's rows, counted from its first, that are among `rows` of the batch."""
        begin = min(max(self.begin, rows.start), self.end)
        return slice(begin - self.begin, max(min(self.end, rows.stop), begin) - self.begin)


def parts(domains: Domains, batch_size: int, weights: Sequence[int] = ()) -> list[Part]:
    """Shares of the domains, in their order, in proportion to the weights; none: equal ones.

    They are cut where the exact shares so far end, rounded down: each is less than one row from its
    own, together they are the batch, and every batch has the same.
    """
    weights = weights or (1,) * len(domains)
    upto = itertools.accumulate(weights, initial=0)
    cuts = [batch_size * so_far // sum(weights) for so_far in upto]
    return [Part(d, b, e) for d, b, e in zip(domains, cuts[:-1], cuts[1:], strict=True)]


@dataclass(frozen=True)
class ViewConfig:
    """What a batch is made of."""

    batch_size: int
    frame_stack: int
    pad: int
    dtype: torch.dtype
    """Of the views."""
    rows: slice
    """Of the batch, those that this process trains on."""
    shares: tuple[int, ...] = ()
    """Of the domains in a batch of several, their weights; none: equal ones."""

    def parts(self, domains: Domains) -> list[Part]:
        return parts(domains, self.batch_size, self.shares)


class Feed(ABC):
    """draw(domains), then views(domains).

    Batches are those of `ReplayBuffer.sample` with the same generator, one call a domain.
    """

    @abstractmethod
    def draw(self, domains: Domains) -> None:
        """The next batch. The host may get some batches ahead of the device, and then waits."""

    @abstractmethod
    def views(self, domains: Domains) -> tuple[Tensor, Tensor]:
        """obs and next_obs of the batch drawn last, [B, K*C, H, W]: bytes, or floats in [0, 1] with
        channels last.

        Work for the device alone, on tensors that stay where they are: fit for a CUDA graph.
        """


def frame_bytes(buffer: ReplayBuffer, domains: Domains) -> int:
    """Bytes of the frames that the domains hold."""
    total = 0
    for domain in domains:
        channels, height, width = buffer.spec(domain).frame_shape
        slots = min(buffer.cursor(domain), buffer.capacity(domain))
        total += slots * channels * height * width
    return total


def fits(buffer: ReplayBuffer, domains: Domains, device: torch.device) -> bool:
    """Whether the frames leave a GPU enough memory for the updates."""
    # Those of a run before this one in the same process lie there until its cycles are collected,
    # and then in torch's cache, where the driver does not count them as free.
    gc.collect()
    torch.cuda.empty_cache()  # of all devices
    free, _ = torch.cuda.mem_get_info(device)
    return frame_bytes(buffer, domains) <= RESIDENT_SHARE * free


class StagingBuffers:
    """Buffers on the host that are sent to the device in turns, each written again only when the
    device has read it."""

    def __init__(self, buffers: Sequence[Tensor], device: torch.device) -> None:
        self._buffers = buffers
        self._cuda = device.type == "cuda"
        self._sent: list[Any] = [None] * len(buffers)
        self._turn = 0

    def writable(self) -> Tensor:
        """The next buffer, once it is free."""
        if self._sent[self._turn] is not None:
            self._sent[self._turn].synchronize()
        return self._buffers[self._turn]

    def send(self, to: Tensor) -> None:
        """Copies that buffer on the current stream, without waiting."""
        to.copy_(self._buffers[self._turn], non_blocking=True)
        if self._cuda:
            self._sent[self._turn] = torch.cuda.current_stream(to.device).record_event()
        self._turn = (self._turn + 1) % len(self._buffers)


class ResidentFeed(Feed):
    """Frames on the device; a batch is the numbers of its frames, some KB."""

    def __init__(
        self,
        buffer: ReplayBuffer,
        domains: Domains,
        config: ViewConfig,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self._copy = buffer.resident(device, domains)
        self._config = config
        self._generator = generator
        # Of every row 2K numbers of frames and 2 shifts of two numbers.
        self._numbers = torch.zeros(
            config.batch_size * (2 * config.frame_stack + 4), dtype=torch.int64, device=device
        )
        pinned = device.type == "cuda"
        self._host = StagingBuffers(
            [
                torch.zeros(self._numbers.shape, dtype=torch.int64, pin_memory=pinned)
                for _ in range(AHEAD)
            ],
            device,
        )

    def draw(self, domains: Domains) -> None:
        c = self._config
        numbers = self._host.writable()
        for part in c.parts(domains):
            index, shifts = self._of(numbers, part)
            self._copy.draw(part.domain, index, shifts, pad=c.pad, generator=self._generator)
        self._host.send(self._numbers)

    def views(self, domains: Domains) -> tuple[Tensor, Tensor]:
        c = self._config
        made: list[tuple[Tensor, ...]] = []
        for part in c.parts(domains):
            index, shifts = self._of(self._numbers, part)
            mine = part.of(c.rows)
            if mine.start == mine.stop:
                continue
            both = frame_stack(
                self._copy.frames(part.domain), index[:, mine].flatten(0, 1),
                shifts[:, mine].flatten(0, 1) if c.pad > 0 else None, c.pad, c.dtype,
            )  # fmt: skip
            made.append(both.chunk(2))
        obs, next_obs = zip(*made, strict=True)
        return whole(obs), whole(next_obs)

    def _of(self, numbers: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """index [2, n, K] and shifts [2, n, 2] of a part."""
        k, n = self._config.frame_stack, part.end - part.begin
        width = 2 * k + 4
        block = numbers[part.begin * width : part.end * width]
        return block[: 2 * n * k].view(2, n, k), block[2 * n * k :].view(2, n, 2)


def whole(views: Sequence[Tensor]) -> Tensor:
    """The rows of all; of floats channels-last, which is what their convolutions want."""
    batch = views[0] if len(views) == 1 else torch.cat(list(views))
    if batch.dtype == torch.uint8:
        return batch.contiguous()
    return batch.contiguous(memory_format=torch.channels_last)
