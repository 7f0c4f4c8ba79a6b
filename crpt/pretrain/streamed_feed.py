"""Views for a GPU that the frames do not fit on: batches are drawn and sent ahead by a thread."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crpt.ops import frame_stack
from crpt.pretrain.feeds import AHEAD, Domains, Feed, StagingBuffers, ViewConfig, whole
from crpt.replay import ReplayBuffer

# Batches on the device: one in use, one that arrives.
STAGED = 2
_POLL_SECONDS = 0.1


class StreamedFeed(Feed):
    """uint8 batches, of a team this process's rows of them, through pinned memory, on a stream of
    their own while the device computes.

    `sequence` is what will be asked for, over and over; or, where that is not how it goes on,
    `upcoming()` what follows the batch that is asked for now. Where something else is asked for, or
    the generator was set anew, what was drawn ahead is dropped, and drawing begins again there.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        sequence: Sequence[Domains],
        config: ViewConfig,
        device: torch.device,
        generator: torch.Generator,
        upcoming: Callable[[], Iterable[Domains]] | None = None,
    ) -> None:
        self._upcoming = upcoming
        self._buffer, self._sequence = buffer, list(sequence)
        self._config, self._device, self._generator = config, device, generator
        channels, height, width = buffer.spec(sequence[0][0]).frame_shape
        rows = config.rows.stop - config.rows.start
        shape = (2, rows, config.frame_stack * channels, height, width)
        self._pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._staged = [torch.empty_like(self._pixels) for _ in range(STAGED)]
        self._frame_shape = (channels, height, width)
        count = 2 * rows * config.frame_stack
        self._index = torch.arange(count, device=device).view(2, -1, config.frame_stack)
        self._ahead: _Ahead | None = None

    def draw(self, domains: Domains) -> None:
        drawn = None if self._ahead is None else self._ahead.get()
        state = self._generator.get_state()
        if drawn is None or drawn.domains != domains or not torch.equal(drawn.before, state):
            self.close()
            self._ahead = self._start(domains)
            drawn = self._ahead.get()
        assert self._ahead is not None
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        if stream is not None:
            stream.wait_event(drawn.sent)
        self._pixels.copy_(self._staged[drawn.slot], non_blocking=True)
        self._ahead.give_back(drawn.slot, None if stream is None else stream.record_event())
        self._generator.set_state(drawn.after)

    def views(self, domains: Domains) -> tuple[Tensor, Tensor]:
        c = self._config
        frames = self._pixels.view(-1, *self._frame_shape)
        obs, next_obs = (
            whole([frame_stack(frames, index, None, 0, c.dtype)]) for index in self._index
        )
        return obs, next_obs

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _start(self, domains: Domains) -> _Ahead:
        order: Iterable[Domains] = itertools.repeat(domains)
        if self._upcoming is not None:
            order = itertools.chain([domains], self._upcoming())
        elif domains in self._sequence:
            at = self._sequence.index(domains)
            order = itertools.cycle(self._sequence[at:] + self._sequence[:at])
        return _Ahead(self._buffer, order, self._config, self._staged, self._generator)


@dataclass(frozen=True)
class _Drawn:
    """A batch drawn ahead, and the states of the generator before and after it."""

    domains: Domains
    slot: int
    sent: Any
    """The event behind its copy to the device; None on a CPU."""
    before: Tensor
    after: Tensor


class _Ahead:
    """The thread, which fills pinned buffers and sends them to free slots on the device."""

    def __init__(
        self,
        buffer: ReplayBuffer,
        order: Iterable[Domains],
        config: ViewConfig,
        staged: Sequence[Tensor],
        generator: torch.Generator,
    ) -> None:
        self._ready: queue.Queue[_Drawn | BaseException] = queue.Queue()
        self._free: queue.Queue[tuple[int, Any] | None] = queue.Queue()
        device = staged[0].device
        cuda = device.type == "cuda"
        read = torch.cuda.current_stream(device).record_event() if cuda else None
        for slot in range(len(staged)):
            self.give_back(slot, read)
        own = torch.Generator().set_state(generator.get_state())
        self._thread = threading.Thread(
            target=_draw_ahead,
            args=(
                buffer, order, config, staged, own, self._ready, self._free,
                torch.get_num_threads(),
            ),
            name="crpt-feed",
            daemon=True,
        )  # fmt: skip
        # The thread knows the queues, not this object: dropping this one stops it. At exit too: a
        # thread that comes back from a kernel to an interpreter that is gone aborts the process.
        self._finalizer = weakref.finalize(self, _stop, self._free, self._thread)
        self._thread.start()

    def get(self) -> _Drawn:
        while True:
            try:
                item = self._ready.get(timeout=_POLL_SECONDS)  # so that Ctrl-C comes through
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self._ready.put(item)  # for who asks again: the thread is gone
                raise item
            return item

    def give_back(self, slot: int, read: Any) -> None:
        """The slot may be written again after the event `read`."""
        self._free.put((slot, read))

    def close(self) -> None:
        self._finalizer()


def _stop(free: queue.Queue[tuple[int, Any] | None], thread: threading.Thread) -> None:
    with suppress(queue.Empty):
        while True:  # what is free already is not filled any more
            free.get_nowait()
    free.put(None)
    thread.join()


def _draw_ahead(
    buffer: ReplayBuffer,
    order: Iterable[Domains],
    config: ViewConfig,
    staged: Sequence[Tensor],
    generator: torch.Generator,
    ready: queue.Queue[_Drawn | BaseException],
    free: queue.Queue[tuple[int, Any] | None],
    threads: int,
) -> None:
    torch.set_num_threads(threads)  # OpenMP would give a new thread another number
    device = staged[0].device
    cuda = device.type == "cuda"
    stream = None
    try:
        stream = torch.cuda.Stream(device) if cuda else None
        host = StagingBuffers(
            [
                torch.zeros(staged[0].shape, dtype=torch.uint8, pin_memory=cuda)
                for _ in range(AHEAD)
            ],
            device,
        )
        for domains in order:
            before, pixels = generator.get_state(), host.writable()
            _fill(buffer, config, domains, pixels, generator)
            granted = free.get()
            if granted is None:
                return
            slot, read = granted
            sent = None
            with torch.cuda.stream(stream):  # none: nothing happens
                if stream is not None:
                    stream.wait_event(read)
                host.send(staged[slot])
                if stream is not None:
                    sent = stream.record_event()
            ready.put(_Drawn(domains, slot, sent, before, generator.get_state()))
    except BaseException as error:
        ready.put(error)
    finally:
        if stream is not None:
            stream.synchronize()  # the next thread writes to the same slots


def _fill(
    buffer: ReplayBuffer,
    config: ViewConfig,
    domains: Domains,
    pixels: Tensor,
    generator: torch.Generator,
) -> None:
    """pixels: [2, rows, K*C, H, W], obs and next_obs of this process's rows, part after part."""
    begin = 0
    for part in config.parts(domains):
        mine = part.of(config.rows)
        end = begin + mine.stop - mine.start
        obs, next_obs = pixels[:, begin:end]
        like = buffer.empty(part.domain, 1, frame_stack=config.frame_stack)
        scalars: dict[str, Any] = {
            name: torch.empty((len(obs), *tensor.shape[1:]), dtype=tensor.dtype)
            for name, tensor in like.tensors()
            if name not in ("obs", "next_obs")
        }
        # Also of a part with none of them: others draw, and the generator is that of all.
        buffer.sample(
            part.domain, part.end - part.begin, frame_stack=config.frame_stack, pad=config.pad,
            generator=generator, out=replace(like, obs=obs, next_obs=next_obs, **scalars),
            rows=mine,
        )  # fmt: skip
        begin = end
