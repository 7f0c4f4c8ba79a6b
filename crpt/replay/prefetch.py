"""Batches drawn ahead by a thread: the kernels under it release the GIL."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from crpt.replay.batch import Batch

_POLL_SECONDS = 0.1
_stops: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()


@atexit.register
def _stop_all() -> None:
    # A thread that comes back from a kernel to an interpreter that is gone aborts the process.
    running = list(_stops.items())
    for _, stop in running:
        stop.set()
    for thread, _ in running:
        thread.join()


def step_seed(seed: int, step: int) -> int:
    """The 64-bit seed of one step's batch."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


class Batches:
    """An iterator; its thread ends with it, with an error, or with close()."""

    def __init__(
        self,
        draw: Callable[[int], Batch],
        *,
        start: int,
        stop: int | None,
        prefetch: int,
        device: torch.device | None,
    ) -> None:
        """`draw` makes the batch of a step, on the device; `prefetch`: how many lie ready."""
        self._ready: queue.Queue[Any] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._over = False
        self._thread = threading.Thread(
            target=_draw_ahead,
            args=(draw, start, stop, device, self._ready, self._stop),
            name="crpt-batches",
            daemon=True,
        )
        # The thread knows the queue, not this object: dropping this one stops it.
        self._finalizer = weakref.finalize(self, self._stop.set)
        _stops[self._thread] = self._stop
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        item = self._next()
        if item is None or isinstance(item, BaseException):
            self.close()
            if item is None:
                raise StopIteration
            raise item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(batch.obs.device)
            stream.wait_event(copied)
            for _, tensor in batch.tensors():
                tensor.record_stream(stream)
        return batch

    def _next(self) -> Any:
        while not self._over:
            try:
                return self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue  # closed by another thread, perhaps
        return None

    def close(self) -> None:
        """Stops the thread; what it has drawn ahead is dropped."""
        self._over = True
        self._stop.set()
        self._thread.join()
        while not self._ready.empty():
            self._ready.get_nowait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _draw_ahead(
    draw: Callable[[int], Batch],
    start: int,
    stop: int | None,
    device: torch.device | None,
    ready: queue.Queue[Any],
    stopped: threading.Event,
) -> None:
    stream = None
    if device is not None and device.type == "cuda":
        stream = torch.cuda.Stream(device)
    step = start
    while not stopped.is_set() and (stop is None or step < stop):
        try:
            with torch.cuda.stream(stream):  # none: nothing happens
                item: Any = (draw(step), None if stream is None else stream.record_event())
        except BaseException as error:
            item = error
        if not _put(item, ready, stopped) or isinstance(item, BaseException):
            return
        step += 1
    _put(None, ready, stopped)


def _put(item: Any, ready: queue.Queue[Any], stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            ready.put(item, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False
