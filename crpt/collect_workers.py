"""Processes that record domains side by side. A domain is recorded by one process at a time.

Killing a worker at any moment is safe: the dataset keeps what was committed, and whoever records
the domain next goes on from there with the same bytes. So workers are stopped by killing them, and
one that died or hangs (drivers do, when several processes render on one GPU) is replaced.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from crpt.random_play import CollectError, MakeEnv, record
from crpt.replay import ReplayBuffer

if TYPE_CHECKING:
    from crpt.config import CollectConfig

_log = logging.getLogger(__name__)
_CONTEXT = multiprocessing.get_context("spawn")  # a forked process cannot use OpenGL
_POLL_SECONDS = 0.25
_STALL_SECONDS = 300.0
_ATTEMPTS = 3


class _Worker:
    """The parent's end of one process."""

    def __init__(self, config: CollectConfig, dataset: Path, seed: int, make_env: MakeEnv) -> None:
        self.connection, child = _CONTEXT.Pipe()
        arguments = (child, config, dataset, seed, make_env)
        self._process = _CONTEXT.Process(target=_main, args=arguments, daemon=True)
        with _main_module_hidden(unless_it_has=make_env):
            self._process.start()
        child.close()
        self.domain = ""
        self._moved: tuple[int, float] = (-1, 0.0)

    def begin(self, domain: str) -> None:
        self.domain = domain
        self._moved = (-1, time.monotonic())
        self.connection.send(domain)

    def has_stalled(self, transitions: int) -> bool:
        if transitions != self._moved[0]:
            self._moved = (transitions, time.monotonic())
        return time.monotonic() - self._moved[1] > _STALL_SECONDS

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()

    def problem(self) -> str:
        """What is wrong with a process that closed its connection or stalled; it is killed."""
        self._process.join(timeout=1.0)  # one that closed its connection is about to end
        code = self._process.exitcode
        self.kill()
        if code is None:
            return f"made no progress for {_STALL_SECONDS:.0f} s"
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"died ({name})" + (", perhaps out of memory" if code == -signal.SIGKILL else "")


def record_in_processes(
    config: CollectConfig,
    dataset: Path,
    domains: Sequence[str],
    *,
    workers: int,
    seed: int,
    make_env: MakeEnv,
    on_progress: Callable[[dict[str, int]], None],
) -> None:
    """Records the domains, calling `on_progress` now and then with the transitions of each.

    Raises what the first failing worker raised; the others are stopped, and keep what they
    committed.
    """
    crew = _Crew(domains, workers, lambda: _Worker(config, dataset, seed, make_env))
    try:
        while crew.assign():
            ready = multiprocessing.connection.wait(crew.connections(), _POLL_SECONDS)
            buffer = ReplayBuffer.open(dataset)
            counts = {d: buffer.num_transitions(d) for d in domains if d in buffer.domains}
            on_progress(counts)
            crew.attend(ready, counts)
    finally:
        crew.kill()


class _Crew:
    """The workers, each with a domain, and the domains that wait for one."""

    def __init__(
        self, domains: Sequence[str], size: int, new_worker: Callable[[], _Worker]
    ) -> None:
        self._waiting = deque(domains)
        self._size = size
        self._new_worker = new_worker
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._failures: dict[str, tuple[int, int]] = {}

    def assign(self) -> bool:
        """Gives waiting domains to workers; false when all domains are recorded."""
        while self._waiting and len(self._busy) < self._size:
            worker = self._idle.pop() if self._idle else self._new_worker()
            self._busy.append(worker)
            worker.begin(self._waiting.popleft())
        return bool(self._busy)

    def connections(self) -> list[Connection]:
        return [worker.connection for worker in self._busy]

    def attend(self, ready: Sequence[object], counts: dict[str, int]) -> None:
        """Takes in what workers said; raises their errors, and replaces those that died or hang."""
        for worker in list(self._busy):
            count = counts.get(worker.domain, 0)
            try:
                if worker.connection in ready:
                    error = worker.connection.recv()
                    if error is not None:
                        raise error
                    self._busy.remove(worker)
                    self._idle.append(worker)
                elif worker.has_stalled(count):
                    self._replace(worker, count)
            except (EOFError, ConnectionError):
                self._replace(worker, count)

    def kill(self) -> None:
        for worker in self._busy + self._idle:
            worker.kill()

    def _replace(self, worker: _Worker, count: int) -> None:
        self._busy.remove(worker)
        problem = f"the process recording {worker.domain} {worker.problem()}"
        # Ends that come again and again at one place; one that got further starts the count anew.
        place, times = self._failures.get(worker.domain, (-1, 0))
        times = times + 1 if count <= place else 1
        if times == _ATTEMPTS:
            raise CollectError(
                f"{problem}, {times} times; what was committed is whole: run the same command "
                "again, perhaps with fewer workers"
            )
        self._failures[worker.domain] = (max(count, place), times)
        _log.warning("%s; starting another", problem)
        self._waiting.appendleft(worker.domain)


def _main(
    connection: Connection, config: CollectConfig, dataset: Path, seed: int, make_env: MakeEnv
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            domain = connection.recv()
        except EOFError:
            return
        try:
            buffer = ReplayBuffer.open(dataset)
            record(config, buffer, domain, seed=seed, make_env=make_env)
            connection.send(None)
        except Exception as error:
            connection.send(_portable(error))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error, or one of the same words if it cannot be sent to another process."""
    error.add_note(f"in a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        replacement = CollectError(f"{type(error).__name__}: {error}")
        replacement.add_note(error.__notes__[-1])
        return replacement
    return error


@contextlib.contextmanager
def _main_module_hidden(unless_it_has: MakeEnv) -> Iterator[None]:
    """Keeps a spawned process from importing the parent's main script, if it needs nothing of it.

    The import would cost seconds (torch), and run a script without an `if __name__` guard again.
    """
    try:
        needs_main = b"__main__" in pickle.dumps(unless_it_has)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TypeError(
            "make_env should be a function of a module, to be sent to worker processes (or workers "
            f"should be 1), got {unless_it_has!r}"
        ) from error
    main = sys.modules["__main__"]
    if needs_main:
        yield
        return
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
