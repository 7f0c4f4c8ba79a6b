"""Datasets on disk: every kind of crash, a full disk and bad files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from toy_collect import contents
from toy_replay import SPEC, filled, write_episode

from crpt import replay
from crpt.replay import DomainSpec, ReplayBuffer
from crpt.replay.drafts import draft_directory

# Crashes


class Crash(BaseException):
    """Stands for the end of the process."""


def crash_at_line(n: int) -> Callable[[FrameType, str, Any], Any]:
    """A tracer that raises before the n-th line that runs inside crpt.replay."""
    folder = os.path.dirname(replay.__file__)
    seen = 0

    def trace(code_frame, event, _):
        nonlocal seen
        if not code_frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            seen += 1
            if seen == n:
                raise Crash
        return trace

    return trace


def continue_writing(path: Path) -> None:
    """Writes episodes of 2, 3, ..., 6 transitions; goes on where it was cut."""
    buffer = ReplayBuffer.open(path)
    with buffer.writer("toy", when_full="grow") as writer:
        for e in range(len(buffer.episodes("toy")), 5):
            write_episode(writer, 20 * e, 2 + e)
        writer.fit(0)


def test_an_empty_directory_becomes_the_dataset(tmp_path):
    filled(tmp_path, episodes=1)
    assert ReplayBuffer.open(tmp_path).num_transitions("toy") == 6


@pytest.fixture
def small_growth(monkeypatch):
    from crpt.replay import writer

    monkeypatch.setattr(writer, "_GROWTH", 7)


@pytest.mark.usefixtures("small_growth")
@pytest.mark.parametrize("step", [307, pytest.param(61, marks=pytest.mark.slow)])
def test_a_crash_at_any_line_loses_at_most_the_episode_it_was_in(tmp_path, step):
    spec = DomainSpec(capacity=3, action_shape=(2,), state_shape=(1,), frame_shape=(1, 4, 4))
    whole = tmp_path / "whole"
    ReplayBuffer.create(whole, {"toy": spec})
    continue_writing(whole)
    assert ReplayBuffer.open(whole).num_transitions("toy") == 20
    crashes = 0
    for line in range(1, 100_000, step):
        path = tmp_path / "cut"
        ReplayBuffer.create(path, {"toy": spec})
        sys.settrace(crash_at_line(line))
        try:
            continue_writing(path)
            crashed = False
        except Crash:
            crashed = True
        finally:
            sys.settrace(None)
        episodes = [len(e) for e in ReplayBuffer.open(path).episodes("toy")]
        assert episodes[:-1] == [3, 4, 5, 6, 7][: max(len(episodes) - 1, 0)]
        continue_writing(path)
        assert contents(path) == contents(whole), f"after a crash at line {line}"
        shutil.rmtree(path)
        crashes += crashed
        if not crashed:
            break
    assert crashes > 50 * 61 / step


def test_a_crash_while_a_dataset_is_made_leaves_none_or_a_whole_one(tmp_path):
    for line in range(1, 100_000, 11):
        path = tmp_path / str(line) / "data"
        path.parent.mkdir()
        sys.settrace(crash_at_line(line))
        try:
            ReplayBuffer.create(path, {"toy": SPEC})
            crashed = False
        except Crash:
            crashed = True
        finally:
            sys.settrace(None)
        if path.exists():
            ReplayBuffer.open(path)
        else:
            ReplayBuffer.create(path, {"toy": SPEC})
        if not crashed:
            return
    pytest.fail("create() never ended")


def test_what_a_kill_leaves_of_a_dataset_goes_with_the_next(tmp_path, monkeypatch):
    path = tmp_path / "[d]"  # no pattern
    spec = DomainSpec(capacity=8, action_shape=(1,), frame_shape=(3, 4, 4))

    def killed(source, target):
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(Path, "rename", killed)
            ReplayBuffer.create(path, {"toy": spec})
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "toy" / "frames.npy").stat().st_size > 8 * 48
    with draft_directory(path) as mine:  # of a process that is there: it stays
        assert [d.name for d in tmp_path.iterdir()] == [mine.name]
        with pytest.raises(FileExistsError):
            ReplayBuffer.create(path, {"toy": spec})
    ReplayBuffer.create(path, {"toy": spec})
    assert [d.name for d in tmp_path.iterdir()] == ["[d]"]


def test_the_disk_fills_up_on_the_way(tmp_path, monkeypatch):
    path = tmp_path / "data"
    buffer = ReplayBuffer.create(path, {"toy": SPEC})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with buffer.writer("toy", when_full="grow") as writer:
        write_episode(writer, 0, 5)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(replay.DatasetFullError, match="make room and run the same command"):
            write_episode(writer, 10, 5)
    monkeypatch.undo()
    buffer = ReplayBuffer.open(path)
    assert buffer.num_transitions("toy") == 5 + 2
    with buffer.writer("toy", when_full="grow") as writer:
        write_episode(writer, 10, 5)
    assert buffer.arrays("toy")["rewards"][[5, 7, 11]].tolist() == [5, 11, 15]


def test_a_file_system_without_fallocate_gets_real_blocks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    spec = DomainSpec(capacity=100, action_shape=(1,))
    ReplayBuffer.create(tmp_path / "data", {"toy": spec})
    stat = (tmp_path / "data" / "toy" / "frames.npy").stat()
    assert stat.st_blocks * 512 >= stat.st_size == 128 + 100 * 3 * 84 * 84


def test_disk_space_is_checked_before_anything_is_made(tmp_path):
    huge = DomainSpec(capacity=10**12, action_shape=(1,))
    with pytest.raises(replay.DatasetFullError, match=r"needs .* of disk, but .* are free"):
        ReplayBuffer.create(tmp_path / "data", {"toy": huge})
    assert list(tmp_path.iterdir()) == []


# Bad files


def shorten(path: Path, name: str, by: int) -> None:
    os.truncate(path / name, (path / name).stat().st_size - by)


def edit(path: Path, key: str, value: object) -> None:
    file = path / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


def set_cursor(path: Path, word: int) -> None:
    (path / "toy" / "cursor").write_bytes(np.array(word, "<u8").tobytes())


def set_stamp(path: Path, slot: int, word: int) -> None:
    stamps = np.load(path / "toy" / "stamps.npy", mmap_mode="r+")
    stamps[slot] = word


BAD = {
    "newer": (lambda p: edit(p, "format_version", 3), replay.DatasetVersionError, "upgrade crpt"),
    "older": (
        lambda p: edit(p, "format_version", 0),
        replay.DatasetVersionError,
        "collect it again",
    ),
    "version": (
        lambda p: edit(p, "format_version", "x"),
        replay.DatasetCorruptError,
        "format_version",
    ),
    "no json": (
        lambda p: (p / "dataset.json").unlink(),
        replay.DatasetCorruptError,
        "not a dataset",
    ),
    "cut json": (
        lambda p: shorten(p, "dataset.json", 9),
        replay.DatasetCorruptError,
        "cannot be read",
    ),
    "domains": (lambda p: edit(p, "domains", [1]), replay.DatasetCorruptError, "cannot be read"),
    "escape": (
        lambda p: edit(p, "domains", {"../x": {"capacity": 1, "action_shape": [1]}}),
        replay.DatasetCorruptError,
        "domain should be letters",
    ),
    "missing": (
        lambda p: (p / "toy/frames.npy").unlink(),
        replay.DatasetCorruptError,
        "is missing",
    ),
    "short": (lambda p: shorten(p, "toy/frames.npy", 1), replay.DatasetCorruptError, "cut short"),
    "empty": (
        lambda p: os.truncate(p / "toy/states.npy", 0),
        replay.DatasetCorruptError,
        "not a .npy",
    ),
    "dtype": (
        lambda p: np.save(p / "toy/frames.npy", np.zeros((100, 1, 4, 4), np.float32)),
        replay.DatasetCorruptError,
        "should hold uint8 .* got float32",
    ),
    "shape": (
        lambda p: np.save(p / "toy/actions.npy", np.zeros((100, 3), np.float32)),
        replay.DatasetCorruptError,
        r"\[100, 2\], got float32 of shape \[100, 3\]",
    ),
    "order": (
        lambda p: np.save(
            p / "toy/frames.npy", np.zeros((100, 1, 4, 4), np.uint8, order="F")[::1].T.T
        ),
        replay.DatasetCorruptError,
        "should hold uint8",
    ),
    "pickle": (
        lambda p: np.save(p / "toy/rewards.npy", np.array([None] * 100)),
        replay.DatasetCorruptError,
        "should hold float32",
    ),
    "no cursor": (
        lambda p: (p / "toy/cursor").unlink(),
        replay.DatasetCorruptError,
        "cursor is missing",
    ),
    "no epoch": (
        lambda p: (p / "toy/epoch").unlink(),
        replay.DatasetCorruptError,
        "epoch is missing",
    ),
    "short cursor": (lambda p: shorten(p, "toy/cursor", 1), replay.DatasetCorruptError, "8 bytes"),
    "long cursor": (
        lambda p: (p / "toy/cursor").write_bytes(bytes(24)),
        replay.DatasetCorruptError,
        "8 bytes, got 24",
    ),
    "beyond": (lambda p: set_cursor(p, 129), replay.DatasetCorruptError, "does not fit"),
    "behind": (lambda p: set_cursor(p, 10), replay.DatasetCorruptError, "10 steps .* 28 found"),
    "huge": (lambda p: set_cursor(p, 2**63), replay.DatasetCorruptError, "does not fit"),
    "stamp": (lambda p: set_stamp(p, 90, 500), replay.DatasetCorruptError, "does not fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(tmp_path, case):
    spoil, error, message = BAD[case]
    path = tmp_path / "data"
    filled(path)
    spoil(path)
    with pytest.raises(error, match=message):
        ReplayBuffer.open(path)


@pytest.mark.filterwarnings("ignore:invalid escape")  # numpy reads a header as Python
def test_no_file_s_content_crashes_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr("crpt.replay.store._MAP_ATTEMPTS", 1)
    chance = np.random.default_rng(0)
    good = tmp_path / "good"
    filled(good)
    files = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    outcomes = []
    for _ in range(200):
        path = tmp_path / "bad"
        shutil.copytree(good, path)
        spoil_at_random(path / files[chance.integers(len(files))], chance)
        outcomes.append(try_to_use(path))
        shutil.rmtree(path)
    assert 50 < outcomes.count("used") < 150


def spoil_at_random(file: Path, chance: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    if chance.random() < 0.1:
        content = content[: chance.integers(len(content))]
    start = 128 if len(content) > 200 and chance.random() < 0.7 else 0  # past a header, or in it
    for _ in range(chance.integers(1, 9)):
        if content:
            content[chance.integers(start, len(content))] = chance.integers(256)
    file.write_bytes(content)


def try_to_use(path: Path) -> str:
    try:
        buffer = ReplayBuffer.open(path)
        buffer.indices("toy")
        slots = np.concatenate([*buffer.episodes("toy"), np.empty(0, np.int64)])
        buffer.observations("toy", slots)
        buffer.sample("toy", 16, pad=1, n_step=2, gamma=0.9)
        with buffer.writer("toy") as writer:
            write_episode(writer, 200, 3)
    except (replay.DatasetError, ValueError):
        return "refused"
    return "used"


# Readers beside a writer that makes the files longer
