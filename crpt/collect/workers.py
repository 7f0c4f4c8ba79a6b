"""Processes that record domains side by side: the parent's side.

It hands out episodes and the turn to write them (`schedule`), shows what is done, and
replaces processes that died or hang (drivers do, when several render on one GPU).
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
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crpt.collect import process
from crpt.collect.messages import Drop, Failed, Full, Play, Played, Steps, Turn, Written
from crpt.collect.process import Orders
from crpt.collect.random_play import CollectError, MakeEnv, find_end
from crpt.collect.schedule import Episode, Schedule
from crpt.collect.watch import Watch
from crpt.envs import rendering
from crpt.replay import ReplayBuffer

if TYPE_CHECKING:
    from crpt.config import CollectConfig

_log = logging.getLogger(__name__)
_CONTEXT = multiprocessing.get_context("spawn")  # a forked process cannot use OpenGL
_POLL_SECONDS = 0.25
_ATTEMPTS = 3
_BYTES_KEPT = 1 << 30  # by all processes together
_LEAST_BYTES_KEPT = 16 << 20  # by each: 790 frames of 84x84


class _Worker:
    """The parent's end of one process."""

    def __init__(self, index: int, orders: Orders) -> None:
        self.index = index
        self.connection, child = _CONTEXT.Pipe()
        arguments = (child, index, orders)
        self._process = _CONTEXT.Process(
            target=process.main, args=arguments, daemon=True, name=f"collect-{index}"
        )
        with _main_module_hidden(unless_it_has=orders.make_env):
            self._process.start()
        child.close()
        assert self._process.pid is not None
        self.playing: Episode | None = None
        self.domain = ""
        self.is_gone = False
        self.watch = Watch(self._process.pid)

    def send(self, message: Play | Turn | Drop) -> None:
        # One that is gone is found out by reading from it.
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)
        self.watch.resume()

    def messages(self) -> Iterator[Any]:
        """What it has said."""
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, ConnectionError):
            self.is_gone = True

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()

    def ending(self) -> str:
        """How a process ended that closed its connection."""
        self._process.join(timeout=1.0)
        code = self._process.exitcode
        if code is None:
            return "closed its connection"
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"died ({name})" + (", perhaps out of memory" if code == -signal.SIGKILL else "")


def record_in_processes(
    config: CollectConfig,
    dataset: Path,
    written: dict[str, tuple[int, int]],
    *,
    workers: int,
    seed: int,
    make_env: MakeEnv,
    on_progress: Callable[[dict[str, int]], None],
) -> None:
    """Records domains, calling `on_progress` now and then with the transitions of each.

    Raises the error of an environment once all that comes before it is written; the processes are
    stopped then, and what was written whole is kept.

    Args:
        written: for each domain how many episodes and transitions of it are there.
        workers: how many processes.
    """
    schedule = Schedule(
        written,
        config.transitions,
        episode_length=config.episode_length,
        action_repeat=config.action_repeat,
    )
    orders = Orders(
        config,
        dataset,
        seed,
        make_env,
        parent=os.getpid(),
        bytes_kept=max(_BYTES_KEPT // workers, _LEAST_BYTES_KEPT),
        render_threads=render_threads(workers),
        warned=rendering.warned,
    )
    crew = _Crew(schedule, orders, workers)
    try:
        while not schedule.is_complete():
            crew.give()
            on_progress(schedule.counts())
            multiprocessing.connection.wait(crew.connections(), _POLL_SECONDS)
            crew.attend()
        on_progress(schedule.counts())
    finally:
        crew.kill()


def render_threads(workers: int) -> int:
    """Threads of a software renderer in each of so many processes; 0: none beside the caller's.

    More of them than cores would only wait for each other.
    """
    threads = len(os.sched_getaffinity(0)) // workers
    return threads if threads > 1 else 0


class _Crew:
    """The processes, and what each is doing."""

    def __init__(self, schedule: Schedule, orders: Orders, size: int) -> None:
        self._schedule = schedule
        self._orders = orders
        self._workers: list[_Worker] = []
        self._failures: dict[Episode, int] = {}
        self._slowest: dict[str, float] = {}  # seconds of a domain's slowest step
        try:
            for index in range(size):
                self._workers.append(_Worker(index, self._orders))
        except BaseException:
            self.kill()
            raise

    def connections(self) -> list[Connection]:
        return [worker.connection for worker in self._workers]

    def give(self) -> None:
        """Drops what is not needed, then gives turns, and episodes to processes without one."""
        for index, episode in self._schedule.drop_surplus():
            worker = self._workers[index]
            worker.send(Drop(episode))
            if worker.playing == episode:
                worker.playing = None
        for index, episode, room in self._schedule.turns():
            self._workers[index].send(Turn(episode, room))
        for worker in self._workers:
            if worker.playing is None:
                self._hand_out(worker)

    def attend(self) -> None:
        """Takes in what the processes said, and replaces those that died or hang."""
        for worker in list(self._workers):
            for message in worker.messages():
                self._take(worker, message)
            if worker.is_gone:
                self._replace(worker, worker.ending())
            elif worker.playing is None and not self._schedule.turns_of(worker.index):
                worker.watch.pause()
            elif worker.watch.has_stalled(self._patience(worker)):
                self._replace(worker, f"made no progress for {worker.watch.idle:.0f} s")

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()

    def _hand_out(self, worker: _Worker) -> None:
        episode = self._schedule.hand_out(worker.index, worker.domain)
        if episode is not None:
            worker.playing = episode
            worker.watch.begin(new=worker.domain != episode.domain)
            worker.domain = episode.domain
            worker.send(Play(episode))

    def _take(self, worker: _Worker, message: Any) -> None:
        episode = message.episode
        if isinstance(message, (Played, Written, Failed)) and worker.playing == episode:
            worker.playing = None
        if isinstance(message, Full):
            worker.watch.pause()
        else:
            worker.watch.has_progressed()
        schedule = self._schedule
        if not schedule.holds(worker.index, episode):
            return  # it was dropped meanwhile
        match message:
            case Steps(_, length, seconds_per_step, slowest):
                schedule.has_steps(episode, length, seconds_per_step)
                before = self._slowest.get(episode.domain, 0.0)
                self._slowest[episode.domain] = max(before, slowest)
            case Played(_, length):
                schedule.is_played(episode, length)
            case Written(_, length):
                schedule.is_written(episode, length)
            case Failed(_, error):
                schedule.has_failed(episode, error)

    def _patience(self, worker: _Worker) -> float:
        """Seconds without a word after which the process is taken to hang."""
        episode = worker.playing
        failures = self._failures.get(episode, 0) if episode else 0
        patience = worker.watch.patience(self._slowest.get(worker.domain, 0.0))
        return patience * float(2**failures)

    def _replace(self, worker: _Worker, how: str) -> None:
        worker.kill()
        writing = self._schedule.turns_of(worker.index)
        for episode in writing:
            self._find_written(episode)
        self._schedule.take_back(worker.index)
        problem = f"the process recording {worker.domain or 'nothing yet'} {how}"
        for place in {worker.playing, *writing} - {None}:
            assert place is not None
            self._failures[place] = self._failures.get(place, 0) + 1
            if self._failures[place] == _ATTEMPTS:
                raise CollectError(
                    f"{problem}, {_ATTEMPTS} times in the same episode; what was committed is "
                    "whole: run the same command again, perhaps with fewer workers"
                )
        _log.warning("%s; starting another", problem)
        self._workers[worker.index] = _Worker(worker.index, self._orders)

    def _find_written(self, episode: Episode) -> None:
        """A process that died writing an episode may have ended it before it could say so."""
        buffer = ReplayBuffer.open(self._orders.dataset)
        episodes, transitions = find_end(buffer, episode.domain)
        if episodes > episode.number:
            before = self._schedule.written(episode.domain)
            self._schedule.is_written(episode, transitions - before)


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
