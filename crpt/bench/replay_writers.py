"""Processes that write into a shared buffer while they are asked to, for `bench replay`.

Torch is not imported here: a writer needs none, and starts sooner.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crpt.replay import ReplayBuffer, Writer

Call = Literal["append", "extend"]


@dataclass(frozen=True)
class Steps:
    """An episode to write again and again; row 0 is its first frame."""

    frames: NDArray[np.uint8]  # [T + 1, C, H, W]
    actions: NDArray[np.float32]  # [T + 1, A]
    rewards: NDArray[np.float32]  # [T + 1]
    discounts: NDArray[np.float32]  # [T + 1]

    def __len__(self) -> int:
        return len(self.frames) - 1

    def append(self, writer: Writer | _Paced) -> None:
        """Step by step, as an environment gives them."""
        writer.begin(self.frames[0])
        end = len(self)
        for t in range(1, end + 1):
            writer.append(
                self.frames[t], self.actions[t], self.rewards[t], self.discounts[t], last=t == end
            )

    def extend(self, writer: Writer) -> None:
        """All at once."""
        writer.begin(self.frames[0])
        writer.extend(
            self.frames[1:], self.actions[1:], self.rewards[1:], self.discounts[1:], last=True
        )


def random_steps(spec: Any, length: int) -> Steps:
    rng = np.random.default_rng(0)
    rows = length + 1
    return Steps(
        rng.integers(0, 256, (rows, *spec.frame_shape), np.uint8),
        rng.uniform(-1, 1, (rows, *spec.action_shape)).astype(np.float32),
        rng.normal(size=rows).astype(np.float32),
        np.ones(rows, np.float32),
    )


@dataclass(frozen=True)
class Wrote:
    """What a process did when it was asked to."""

    transitions: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.transitions / self.seconds


class WriterProcess:
    """A shared writer of the domain; `start` and then `wait`."""

    def __init__(self, buffer: ReplayBuffer, domain: str, length: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, buffer, domain, length), daemon=True
        )
        self.process.start()
        theirs.close()

    def start(self, call: Call, seconds: float, rate: float | None = None) -> None:
        """Writes whole episodes for so long; with a rate: that many transitions a second."""
        self._pipe.send((call, seconds, rate))

    def wait(self) -> Wrote:
        wrote: Wrote = self._pipe.recv()
        return wrote


@contextmanager
def writer_processes(
    count: int, buffer: ReplayBuffer, domain: str, length: int
) -> Iterator[list[WriterProcess]]:
    """Ready to write, with warm pages."""
    writers = [WriterProcess(buffer, domain, length) for _ in range(count)]
    try:
        for call in ("append", "extend"):
            for writer in writers:
                writer.start(call, 0.1)
            for writer in writers:
                writer.wait()
        yield writers
    finally:
        for writer in writers:
            writer.process.kill()
            writer.process.join()


def _serve(pipe: Connection, buffer: ReplayBuffer, domain: str, length: int) -> None:
    steps = random_steps(buffer.spec(domain), length)
    with buffer.writer(domain, shared=True) as writer:
        while True:
            call, seconds, rate = pipe.recv()
            cpu, begun, count = time.process_time(), time.perf_counter(), 0
            while (now := time.perf_counter()) - begun < seconds:
                if rate is None:
                    getattr(steps, call)(writer)
                else:
                    steps.append(_Paced(writer, rate))
                count += len(steps)
            pipe.send(Wrote(count, now - begun, time.process_time() - cpu))


class _Paced:
    """A writer that waits after each transition until the next one is due."""

    def __init__(self, writer: Writer, rate: float) -> None:
        self._writer, self._rate = writer, rate
        self._begun, self._count = time.perf_counter(), 0

    def begin(self, *step: Any) -> None:
        self._writer.begin(*step)

    def append(
        self,
        frame: NDArray[np.uint8],
        action: NDArray[np.float32],
        reward: float,
        discount: float,
        *,
        last: bool,
    ) -> None:
        self._writer.append(frame, action, reward, discount, last=last)
        self._count += 1
        ahead = self._begun + self._count / self._rate - time.perf_counter()
        if ahead > 0:
            time.sleep(ahead)
