"""A process that hangs is told from one that is slow."""

from __future__ import annotations

import pytest

from crpt.collect import watch
from crpt.collect.watch import Watch


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A clock, and a process 7 with two threads, whose time in the queue for a core is set."""

    class Machine:
        now = 1000.0

        def pass_(self, seconds: float, *, queued: float = 0.0, look_every: float = 1.0) -> bool:
            """Whether `watch` found a hang on the way."""
            stalled = False
            for _ in range(round(seconds / look_every)):
                self.now += look_every
                self.queued += queued * look_every
                self.write()
                stalled |= self.watch.has_stalled(self.watch.patience(0.01))
            return stalled

        def write(self) -> None:
            for thread in ("7", "8"):
                stat = tmp_path / "7" / "task" / thread
                stat.mkdir(parents=True, exist_ok=True)
                (stat / "schedstat").write_text(f"5 {int(self.queued * 5e8)} 3\n")

    made = Machine()
    made.queued = 0.0
    made.write()
    monkeypatch.setattr(watch.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(watch, "_PROC", tmp_path)
    made.watch = Watch(7)
    made.watch.begin(new=True)
    return made


def test_silence_is_borne_longer_at_the_start(machine):
    assert not machine.pass_(290)
    machine.watch.has_progressed()
    assert not machine.pass_(59)
    assert machine.pass_(2)


def test_a_word_begins_the_time_anew(machine):
    machine.watch.has_progressed()
    for _ in range(5):
        assert not machine.pass_(50)
        machine.watch.has_progressed()


def test_slow_steps_are_given_their_time(machine):
    machine.watch.has_progressed()
    assert machine.watch.patience(0.01) == 60
    assert machine.watch.patience(3.0) == 300


def test_waiting_for_the_parent_is_no_hang(machine):
    machine.watch.has_progressed()
    machine.watch.pause()
    assert not machine.pass_(200)
    machine.watch.resume()
    assert machine.pass_(62)


def test_waiting_for_a_core_is_no_hang(machine):
    machine.watch.has_progressed()
    assert not machine.pass_(150, queued=0.95)
    assert machine.pass_(62)


def test_a_machine_that_slept_is_no_hang(machine):
    machine.watch.has_progressed()
    machine.now += 10_000
    assert not machine.watch.has_stalled(60)
    assert machine.pass_(62)


def test_another_environment_of_the_same_process_starts_again(machine):
    machine.watch.has_progressed()
    machine.watch.begin(new=False)
    assert machine.watch.patience(0.01) == 60
    machine.watch.begin(new=True)
    assert machine.watch.patience(0.01) == 300


def test_a_process_that_is_gone_has_queued_for_nothing():
    watch = Watch(2**22 + 1)  # above the kernel's largest
    assert watch._seconds_queued() == 0
