"""A process that plays episodes: the worker's own side.

It keeps what it plays until the parent gives it the turn to write, and goes on to further episodes
meanwhile, up to a bound on memory; an episode that has the turn is written as it is played. Killing
the process at any moment is safe: the dataset keeps the episodes that were written whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from crpt.collect.messages import Begun, Drop, Failed, Full, Play, Played, Steps, Turn, Written
from crpt.collect.random_play import (
    CollectError,
    EpisodeWriter,
    MakeEnv,
    Player,
    Step,
    errors_named,
)
from crpt.collect.schedule import Episode
from crpt.envs import rendering
from crpt.replay import DomainSpec, ReplayBuffer

if TYPE_CHECKING:
    from crpt.config import CollectConfig

_REPORT_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Orders:
    """What is the same for all processes of a collection."""

    config: CollectConfig
    dataset: Path
    seed: int
    make_env: MakeEnv
    parent: int
    """Process number."""
    bytes_kept: int
    """Bound on the frames that a process keeps in memory."""
    render_threads: int
    """Threads of a software renderer in each process; 0: none beside the caller's."""
    warned: bool
    """Whether the parent has said that rendering is slow here."""


@dataclass
class _Recording:
    """An episode on its way to the disk."""

    episode: Episode
    playing: Iterator[Step] | None = None
    spec: DomainSpec | None = None
    kept: list[Step] = field(default_factory=list)
    count: int = 0
    """Transitions so far."""
    writer: EpisodeWriter | None = None
    """While the episode has the turn."""


def main(connection: Connection, index: int, orders: Orders) -> None:
    """Plays what the parent asks for until it closes the connection or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _die_with(orders.parent)
    os.environ.setdefault("LP_NUM_THREADS", str(orders.render_threads))
    rendering.share_devices(index)
    rendering.warned = orders.warned or index > 0  # one process says it for all
    worker = _Worker(connection, orders)
    try:
        worker.run()
    except (EOFError, ConnectionError):
        return


class _Worker:
    """Plays one episode at a time, and keeps those that wait for their turn."""

    def __init__(self, connection: Connection, orders: Orders) -> None:
        self._connection = connection
        self._inbox = select.poll()
        self._inbox.register(connection.fileno(), select.POLLIN)
        self._orders = orders
        self._buffer = ReplayBuffer.open(orders.dataset)
        self._player: Player | None = None
        self._domain = ""
        self._recordings: dict[Episode, _Recording] = {}
        self._current: _Recording | None = None
        self._nbytes = 0
        self._stopwatch = _Stopwatch()

    def run(self) -> None:
        while True:
            # In milliseconds; the connection's own poll() takes ten times as long.
            while self._inbox.poll(0 if self._may_play() else None):
                self._attend(self._connection.recv())
            if self._current is not None:
                with self._failures_told(self._current):
                    self._play_step(self._current)

    def _may_play(self) -> bool:
        current = self._current
        if current is None:
            return False
        if current.writer is not None or self._nbytes < self._orders.bytes_kept:
            return True
        self._connection.send(Full(current.episode))
        return False

    def _attend(self, message: Play | Turn | Drop) -> None:
        if isinstance(message, Play):
            new = self._recordings[message.episode] = _Recording(message.episode)
            with self._failures_told(new):
                self._begin(new)
            return
        recording = self._recordings.get(message.episode)
        if recording is None:
            return  # it failed, and the parent is about to read so
        if isinstance(message, Drop):
            self._forget(recording)
        else:
            with self._failures_told(recording):
                self._write_kept(recording, message.room)

    def _begin(self, recording: _Recording) -> None:
        episode = recording.episode
        if self._player is None or self._domain != episode.domain:
            self._close_player()
            self._domain = episode.domain
            orders = self._orders
            self._player = Player(
                orders.config, episode.domain, seed=orders.seed, make_env=orders.make_env
            )
        steps = self._player.play(episode.number)
        first = next(steps)
        recording.spec = self._player.spec(first)
        recording.playing = steps
        self._keep(recording, first)
        self._current = recording
        self._connection.send(Begun(episode))
        self._stopwatch.restart()

    def _play_step(self, recording: _Recording) -> None:
        assert recording.playing is not None
        step = next(recording.playing)
        self._stopwatch.lap()
        recording.count += 1
        if recording.writer is not None:
            self._write(recording, step)
        else:
            self._keep(recording, step)
            if step.last:
                self._current = recording.playing = None
                self._connection.send(Played(recording.episode, recording.count))
        if self._current is recording and self._stopwatch.is_due():
            said = Steps(recording.episode, recording.count, *self._stopwatch.read())
            self._connection.send(said)

    def _keep(self, recording: _Recording, step: Step) -> None:
        recording.kept.append(step.kept())
        self._nbytes += step.frame.nbytes

    def _write_kept(self, recording: _Recording, room: int) -> None:
        assert recording.spec is not None
        episode, kept, played = recording.episode, recording.kept, recording.count
        if episode.domain not in self._buffer.domains:  # another process may have added it
            self._buffer = ReplayBuffer.open(self._orders.dataset)
        recording.writer = EpisodeWriter(self._buffer, episode.domain, recording.spec, room)
        recording.count = 0
        for step in kept:
            recording.count += step.action is not None
            if self._write(recording, step):
                return
        self._release(recording)
        assert recording.count == played

    def _write(self, recording: _Recording, step: Step) -> bool:
        """Writes the next step of an episode that has the turn; whether that was its last."""
        assert recording.writer is not None
        last = recording.writer.write(step)
        if last:
            self._forget(recording)
            self._connection.send(Written(recording.episode, recording.count))
        return last

    def _forget(self, recording: _Recording) -> None:
        self._release(recording)
        self._recordings.pop(recording.episode, None)
        if recording.writer is not None:
            recording.writer.close()
        if self._current is recording:
            self._current = None

    def _release(self, recording: _Recording) -> None:
        self._nbytes -= sum(step.frame.nbytes for step in recording.kept)
        recording.kept = []

    def _close_player(self) -> None:
        if self._player is not None:
            player, self._player = self._player, None
            player.close()

    @contextlib.contextmanager
    def _failures_told(self, recording: _Recording) -> Iterator[None]:
        try:
            with errors_named(recording.episode.domain):
                yield
        except ConnectionError:
            raise
        except Exception as error:
            self._forget(recording)
            if self._current is None:
                with contextlib.suppress(Exception):  # who knows what state its environment is in
                    self._close_player()
            self._connection.send(Failed(recording.episode, _portable(error)))


class _Stopwatch:
    """How long steps take."""

    def restart(self) -> None:
        self._reported = self._lap = time.monotonic()
        self._laps, self._slowest = 0, 0.0

    def lap(self) -> None:
        now = time.monotonic()
        self._slowest = max(self._slowest, now - self._lap)
        self._lap = now
        self._laps += 1

    def is_due(self) -> bool:
        return self._lap - self._reported > _REPORT_SECONDS

    def read(self) -> tuple[float, float]:
        """Mean and slowest seconds of a step since the last call."""
        times = (self._lap - self._reported) / self._laps, self._slowest
        self._reported, self._laps, self._slowest = self._lap, 0, 0.0
        return times


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, even where it hangs in a driver."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
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
