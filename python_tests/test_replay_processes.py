"""Several processes with one buffer."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from crpt import replay
from crpt.replay import DomainSpec, ReplayBuffer

SPEC = DomainSpec(capacity=64, action_shape=(1,), frame_shape=(1, 8, 8))
SPAWN = multiprocessing.get_context("spawn")
EPISODES, LENGTH = 40, 6


def frame(writer: int, episode: int, step: int) -> np.ndarray:
    return np.full(8, (writer << 32) | (episode << 8) | step, "<u8").view(np.uint8).reshape(1, 8, 8)


def write(buffer: ReplayBuffer, writer: int) -> None:
    with buffer.writer("toy", shared=True) as steps:
        for episode in range(EPISODES):
            steps.begin(frame(writer, episode, 0))
            for step in range(1, LENGTH + 1):
                action = [writer * 1000 + episode]
                steps.append(frame(writer, episode, step), action, step, 1.0, last=step == LENGTH)


def check_samples(buffer: ReplayBuffer) -> None:
    batch = buffer.sample("toy", 64, pad=0)
    obs, after = (
        view.numpy().reshape(64, 3, 64).view("<u8") for view in (batch.obs, batch.next_obs)
    )
    for words in (obs, after):
        assert (words == words[:, :, :1]).all()
    end = after[:, 2, 0].astype(np.int64)
    step = end & 0xFF
    assert batch.reward.tolist() == step.tolist()
    assert batch.action[:, 0].tolist() == ((end >> 32) * 1000 + (end >> 8 & 0xFFFFFF)).tolist()
    for words, newest in ((obs, step - 1), (after, step)):
        for k in range(3):
            expected = end - step + np.maximum(newest - k, 0)
            np.testing.assert_array_equal(words[:, 2 - k, 0], expected)


@pytest.mark.parametrize("in_files", [False, True], ids=["memory", "files"])
def test_processes_write_at_once_while_another_samples(tmp_path, in_files):
    path = tmp_path / "data" if in_files else None
    buffer = ReplayBuffer.create(path, {"toy": SPEC})
    with buffer.writer("toy", shared=True) as steps:
        steps.begin(frame(9, 0, 0))
        steps.append(frame(9, 0, 1), [9000], 1, 1.0, last=True)
    processes = [SPAWN.Process(target=write, args=(buffer, n)) for n in (1, 2)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        check_samples(buffer)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert buffer.cursor("toy") == 2 + 2 * EPISODES * (LENGTH + 1)
    check_samples(buffer)
    assert len(buffer.episodes("toy")) >= 64 // (LENGTH + 1)


def hold(buffer: ReplayBuffer, ready, done) -> None:
    writer = buffer.writer("toy")
    ready.set()
    done.wait()
    writer.close()


def test_the_lock_of_a_buffer_in_memory_holds_between_processes():
    buffer = ReplayBuffer.create(None, {"toy": SPEC})
    ready, done = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(buffer, ready, done))
    process.start()
    assert ready.wait(30)
    for shared in (False, True):
        with pytest.raises(replay.DatasetLockedError):
            buffer.writer("toy", shared=shared)
    process.kill()  # the lock goes with its holder
    process.join()
    buffer.writer("toy").close()


def test_a_buffer_in_files_is_pickled_as_its_path(tmp_path):
    buffer = ReplayBuffer.create(tmp_path / "data", {"toy": SPEC}, {"seed": 3})
    again = pickle.loads(pickle.dumps(buffer))
    assert (again.path, again.metadata) == (buffer.path, buffer.metadata)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_buffer_in_memory_leaves_nothing_behind():
    gc.collect()
    before = open_files(), len(os.listdir("/dev/shm"))
    buffer = ReplayBuffer.create(None, {"toy": SPEC, "other": SPEC})
    with buffer.writer("toy", shared=True) as steps:
        steps.begin(frame(1, 0, 0))
    assert open_files() > before[0]
    del buffer, steps
    gc.collect()
    assert (open_files(), len(os.listdir("/dev/shm"))) == before


def test_memory_is_estimated_before_anything_is_allocated():
    gc.collect()
    before = open_files()
    huge = DomainSpec(capacity=10**9, action_shape=(1,))
    with pytest.raises(replay.NotEnoughMemoryError, match=r"needs .* of memory, but .* are avail"):
        ReplayBuffer.create(None, {"toy": huge})
    buffer = ReplayBuffer.create(None, {})
    with pytest.raises(replay.NotEnoughMemoryError):
        buffer.add_domain("toy", huge)
    assert open_files() == before


def test_shared_and_exclusive_writers_exclude_each_other():
    buffer = ReplayBuffer.create(None, {"toy": SPEC})
    with (
        buffer.writer("toy", shared=True),
        buffer.writer("toy", shared=True),
        pytest.raises(replay.DatasetLockedError, match="shared=True"),
    ):
        buffer.writer("toy")
    with buffer.writer("toy"), pytest.raises(replay.DatasetLockedError):
        buffer.writer("toy", shared=True)
    with pytest.raises(ValueError, match="when_full should be overwrite for a shared writer"):
        buffer.writer("toy", when_full="grow", shared=True)
    with (
        buffer.writer("toy", shared=True) as writer,
        pytest.raises(RuntimeError, match="discard_last_episode"),
    ):
        writer.discard_last_episode()
