"""Updates recorded once and replayed: on a GPU as CUDA graphs, which start all their kernels in one
call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import torch

# The updates of a kind that run as they are written before one is recorded: the first call of a
# kernel may ask the device for things, and cuDNN times its algorithms.
WARM_UP = 3

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class CaptureWarning(UserWarning):
    """Updates cannot be recorded as CUDA graphs, and are done one kernel after the other."""


class Recorder(Protocol):
    """Turns work into something that can be done again, on the same memory."""

    def aside(self, work: Callable[[], None]) -> None:
        """Does the work, where `record` would."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does the work when it is called. Recording alone computes nothing."""


class CudaRecorder:
    """CUDA graphs on a stream of their own, sharing one pool of memory.

    They are replayed one after the other, so what one graph needs for itself the next may use
    again; tensors that somebody holds are left alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def aside(self, work: Callable[[], None]) -> None:
        main = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            work()
        main.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that fill pinned memory meanwhile do not break the recording.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


class UpdateGraphs(Generic[K, T]):
    """update(key) -> what `work(key)` returns, done by replaying a recording of it.

    The first calls of every key do the work as it is written, the next one records it. The result
    is the same objects each time, with new values: copy what should outlast the next call. The work
    has to do all on tensors that stay where they are, and must not wait for the device. Where it
    cannot be recorded, a warning says why, and it is done as it is written from then on.
    """

    def __init__(self, recorder: Recorder, work: Callable[[K], T]) -> None:
        self._recorder = recorder
        self._work = work
        self._failed = False
        self.forget()

    def forget(self) -> None:
        """Begin again: the tensors that were recorded are no longer those in use."""
        self._done: dict[K, int] = {}
        self._replays: dict[K, Callable[[], None]] = {}
        self._results: dict[K, T] = {}

    def __call__(self, key: K) -> T:
        if key not in self._replays and self._done.get(key, 0) >= WARM_UP and not self._failed:
            self._record(key)
        if key in self._replays:
            self._replays[key]()
        else:
            self._recorder.aside(lambda: self._keep(key))
            self._done[key] = self._done.get(key, 0) + 1
        return self._results[key]

    @property
    def recorded(self) -> int:
        """Keys that are replayed by now."""
        return len(self._replays)

    def _keep(self, key: K) -> None:
        self._results[key] = self._work(key)

    def _record(self, key: K) -> None:
        try:
            self._replays[key] = self._recorder.record(lambda: self._keep(key))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._failed = True
            self._replays.clear()
            warnings.warn(
                "an update cannot be recorded as a CUDA graph, and is done one kernel after the "
                f"other, which is slower: {str(error).splitlines()[0]}",
                CaptureWarning,
                stacklevel=4,
            )
