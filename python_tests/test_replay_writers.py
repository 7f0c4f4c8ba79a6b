"""Writers that are inherited, refused or stopped half-way."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from types import SimpleNamespace

import numpy as np
import pytest

import crpt.replay.writer as writer_module
from crpt import replay
from crpt.dataset import verify
from crpt.replay import DatasetError, DatasetLockedError, DomainSpec, ReplayBuffer

SPEC = DomainSpec(capacity=8, action_shape=(1,), frame_shape=(1, 4, 4))
FORK = multiprocessing.get_context("fork")


def frames(count: int) -> np.ndarray:
    return np.ones((count, 1, 4, 4), np.uint8)


def steps(count: int) -> tuple[np.ndarray, ...]:
    return frames(count), np.zeros((count, 1)), np.zeros(count), np.ones(count)


def use(writer, pipe, done) -> None:
    """What a child of fork can do with its parent's writer."""
    told = []
    for call in (lambda: writer.begin(frames(1)[0]), lambda: writer.extend(*steps(2))):
        try:
            call()
        except RuntimeError as error:
            told.append(str(error))
    pipe.send(told)
    done.wait(60)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("shared", [False, True], ids=["exclusive", "shared"])
def test_a_child_of_fork_has_neither_the_writer_nor_its_lock(tmp_path, in_files, shared):
    buffer = ReplayBuffer.create(tmp_path / "ds" if in_files else None, {"toy": SPEC})
    ours, theirs = FORK.Pipe()
    done = FORK.Event()
    with buffer.writer("toy", shared=shared) as writer:
        writer.begin(frames(1)[0])
        child = FORK.Process(target=use, args=(writer, theirs, done))
        child.start()
        told = ours.recv()
        assert len(told) == 2
        assert all("belongs to the process that opened it" in message for message in told)
        with pytest.raises(DatasetLockedError):  # the parent still has it
            buffer.writer("toy")
        writer.extend(*steps(2), last=True)
    assert child.is_alive()
    with buffer.writer("toy") as writer:  # and has given it back, whatever the child has open
        writer.begin(frames(1)[0])
    done.set()
    child.join()
    assert child.exitcode == 0
    assert buffer.cursor("toy") == 4


def test_a_lock_goes_also_where_a_child_has_the_file_open():
    buffer = ReplayBuffer.create(None, {"toy": SPEC})
    writer = buffer.writer("toy")
    inherited = os.dup(writer._store._lock.fileno())  # as a fork without Python's hooks leaves it
    writer.close()
    buffer.writer("toy").close()
    os.close(inherited)


def test_a_shared_writer_says_how_many_steps_of_many_it_committed():
    buffer = ReplayBuffer.create(None, {"toy": SPEC})
    with buffer.writer("toy", shared=True) as writer:
        writer.begin(frames(1)[0])
        # Writers that stalled in all slots.
        stamps = writer._store.arrays["stamps"]
        stamps[:] = np.arange(1, 9, dtype=np.uint64) | np.uint64(1 << 63)
        with pytest.raises(RuntimeError, match=r"^0 of 5 steps were committed; all 8 slots"):
            writer.extend(*steps(5))


def test_a_full_disk_says_how_many_steps_of_many_were_committed(tmp_path, monkeypatch):
    buffer = ReplayBuffer.create(tmp_path / "ds", {"toy": SPEC})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with buffer.writer("toy", when_full="grow") as writer:
        writer.begin(frames(1)[0])
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            replay.DatasetFullError, match=r"^7 of 20 steps were committed; no room"
        ):
            writer.extend(*steps(20))
        assert buffer.cursor("toy") == 8


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    buffer = ReplayBuffer.create(tmp_path / "ds", {"toy": SPEC})

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    for call in (
        lambda: buffer.writer("toy"),
        lambda: buffer.writer("toy", shared=True),
        lambda: buffer.add_domain("other", SPEC),
    ):
        with pytest.raises(DatasetError, match=r"ds.* cannot be locked \(No locks available\)"):
            call()
    (report,) = verify(tmp_path / "ds")
    assert "cannot be locked" in report.problems[0]


def test_what_is_no_directory_or_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DatasetError, match="file is not a dataset"):
        ReplayBuffer.open(file)
    with pytest.raises(DatasetError, match="file/ds is not a dataset"):
        ReplayBuffer.open(file / "ds")
    with pytest.raises(NotADirectoryError, match="file should be a directory"):
        ReplayBuffer.create(file / "ds", {"toy": SPEC})
    buffer = ReplayBuffer.create(tmp_path / "ds", {"toy": SPEC})
    domain = tmp_path / "ds" / "toy"
    domain.rename(tmp_path / "away")
    domain.write_text("")
    with pytest.raises(DatasetError, match="cursor is missing"):
        buffer.writer("toy")
    domain.unlink()
    (tmp_path / "away").rename(domain)
    (domain / "cursor").unlink()
    (domain / "cursor").mkdir()
    with pytest.raises(DatasetError, match="cursor cannot be read"):
        ReplayBuffer.open(tmp_path / "ds")


def test_files_get_shorter_only_when_readers_of_rolled_back_steps_are_through(
    tmp_path, monkeypatch
):
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 100.0, sleep=slept.append)
    monkeypatch.setattr(writer_module, "time", clock)
    buffer = ReplayBuffer.create(tmp_path / "ds", {"toy": SPEC})
    with buffer.writer("toy", when_full="grow") as writer:
        writer.begin(frames(1)[0])
        writer.extend(*steps(4), last=True)
        writer.fit(0)
        assert sum(slept) == 0
        writer.discard_last_episode()
        writer.fit(0)
        assert sum(slept) == pytest.approx(0.2)
