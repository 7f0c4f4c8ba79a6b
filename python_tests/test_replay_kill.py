"""kill -9 at random moments of writing: what was committed is whole, and writing goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from crpt.replay import DomainSpec, ReplayBuffer

SPEC = DomainSpec(capacity=150, action_shape=(2,), state_shape=(1,))  # 84x84: most time in frames
FEW, MANY = 6, 60


def word_of(writer: int, episode: int, step: int) -> int:
    return (writer << 56) | (episode << 16) | step


def frame_of(word: int) -> np.ndarray:
    return np.full(3 * 84 * 84 // 8, word, "<u8").view(np.uint8).reshape(3, 84, 84)


def length_of(episode: int) -> int:
    return 1 + episode * 7 % 23


def write_for_ever(path: Path, writer: int, first_episode: int, shared: bool) -> None:
    with ReplayBuffer.open(path).writer("toy", shared=shared) as steps:
        for episode in range(first_episode, 2**32):
            steps.begin(frame_of(word_of(writer, episode, 0)), [0])
            for step in range(1, length_of(episode) + 1):
                last = step == length_of(episode)
                frame = frame_of(word_of(writer, episode, step))
                steps.append(frame, [episode, step], step, 0.0 if last else 1.0, [step], last)


def child(work: Callable[[], None]) -> int:
    """A process that does the work until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"


def whole_steps(path: Path) -> Iterator[tuple[int, int, int, int, int]]:
    """(ticket, previous, writer, episode, step) of the whole steps, each checked in every field."""
    buffer = ReplayBuffer.open(path)
    arrays = buffer.arrays("toy")
    head = buffer.cursor("toy")
    for slot, stamp in enumerate(arrays["stamps"].tolist()):
        if stamp == 0 or stamp >> 63 or stamp > head:
            continue
        ticket = stamp - 1
        assert ticket % SPEC.capacity == slot
        words = arrays["frames"][slot].reshape(-1).view("<u8")
        assert (words == words[0]).all(), f"step {ticket} is torn"
        word = int(words[0])
        writer, episode, step = word >> 56, (word >> 16) & 0xFFFFFFFF, word & 0xFFFF
        assert arrays["is_first"][slot] == (step == 0)
        last = step == length_of(episode)
        assert arrays["is_last"][slot] == last
        assert arrays["rewards"][slot] == arrays["states"][slot, 0] == step
        assert arrays["discounts"][slot] == (0.0 if last else 1.0)
        assert arrays["actions"][slot].tolist() == ([episode, step] if step else [0, 0])
        yield ticket, int(arrays["previous"][slot]), writer, episode, step


def check_steps(path: Path, lost: int) -> dict[int, tuple[int, int, int]]:
    """Checks all of the last lap but `lost` steps; returns what lies where."""
    head = ReplayBuffer.open(path).cursor("toy")
    found = {}
    links = {}
    for ticket, previous, *identity in whole_steps(path):
        found[ticket] = tuple(identity)
        links[ticket] = previous
    assert len(found) >= min(head, SPEC.capacity) - lost
    for ticket, previous in links.items():
        writer, episode, step = found[ticket]
        if step == 0:
            assert previous == ticket
        elif previous in found:
            assert found[previous] == (writer, episode, step - 1)
        else:  # overwritten by the end of the lap
            assert previous < max(head - SPEC.capacity, 0) + 1 + lost
    return found


def check_samples(path: Path) -> None:
    buffer = ReplayBuffer.open(path)
    batch = buffer.sample("toy", 32, pad=0)
    for obs, next_obs, reward in zip(batch.obs, batch.next_obs, batch.reward, strict=True):
        words = [view.numpy().reshape(3, -1).view("<u8") for view in (obs, next_obs)]
        assert all((view == view[:, :1]).all() for view in words)
        end = int(words[1][2, 0])
        step = end & 0xFFFF
        assert reward == step
        for view, newest in zip(words, (step - 1, step), strict=True):
            steps = [max(0, newest - k) for k in (2, 1, 0)]
            assert view[:, 0].tolist() == [(end & ~0xFFFF) | s for s in steps]


def wait_for_steps(path: Path, more: int) -> None:
    buffer = ReplayBuffer.open(path)
    target = buffer.cursor("toy") + more
    deadline = time.monotonic() + 30
    while buffer.cursor("toy") < target:
        assert time.monotonic() < deadline, "nobody writes"


@pytest.mark.parametrize(
    "kills", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_an_exclusive_writer_killed_at_any_moment(tmp_path, kills):
    path = tmp_path / "data"
    ReplayBuffer.create(path, {"toy": SPEC})
    chance = random.Random(0)
    for n in range(kills):
        pid = child(lambda n=n: write_for_ever(path, n % 200, 0, shared=False))
        wait_for_steps(path, chance.randrange(1, 400))
        time.sleep(chance.random() * 0.001)
        kill(pid)
        # All that the cursor counts, but for the step that was being overwritten.
        found = check_steps(path, lost=1)
        head = ReplayBuffer.open(path).cursor("toy")
        assert head - 1 in found
        check_samples(path)
        ReplayBuffer.open(path).writer("toy").close()
        head = ReplayBuffer.open(path).cursor("toy")
        if head - 1 in found:  # the cut episode is gone, and nothing else
            _, episode, step = found[head - 1]
            assert step == length_of(episode)
            kept = check_steps(path, lost=SPEC.capacity)
            assert kept == {t: i for t, i in found.items() if t < head}


@pytest.mark.parametrize(
    "kills", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_shared_writers_killed_at_any_moment(tmp_path, kills):
    path = tmp_path / "data"
    ReplayBuffer.create(path, {"toy": SPEC})
    chance = random.Random(1)
    pids = {}
    try:
        for n in range(3 + kills):
            if n >= 3:
                wait_for_steps(path, chance.randrange(1, 200))
                time.sleep(chance.random() * 0.001)
                kill(pids.pop(chance.choice(list(pids))))
            pid = child(lambda n=n: write_for_ever(path, n, 0, shared=True))
            pids[pid] = pid
            check_samples(path) if n >= 3 else wait_for_steps(path, 1)
    finally:
        for pid in pids:
            kill(pid)
    # A killed writer costs a slot, and its ticket is without a step.
    check_steps(path, lost=3 * (kills + 3))
    # Nobody is there any more: the next one to open takes the slots back.
    ReplayBuffer.open(path).writer("toy", shared=True).close()
    stamps = ReplayBuffer.open(path).arrays("toy")["stamps"]
    assert not (stamps >> np.uint64(63)).any()
    with ReplayBuffer.open(path).writer("toy") as writer:
        for step in range(2 * SPEC.capacity):
            frame = frame_of(word_of(250, 1, step))
            if step == 0:
                writer.begin(frame, [0])
            else:
                writer.append(frame, [1, step], step, 1.0, [step])
    assert (ReplayBuffer.open(path).arrays("toy")["stamps"] > 0).all()
