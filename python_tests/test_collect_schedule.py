"""Who plays which episode: no order lost, no worker idle, little played for nothing."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crpt.collect.schedule import Episode, Schedule


class Simulation:
    """Workers in virtual time: the length of episode e of domain d is `lengths(d, e)`."""

    def __init__(self, schedule, workers, lengths, seconds, transitions, rng=None, deaths=0):
        self.schedule = schedule
        self.lengths, self.seconds, self.transitions = lengths, seconds, transitions
        self.rng = rng or random.Random(0)
        self.deaths = deaths
        self.playing = dict.fromkeys(range(workers))  # worker -> (episode, steps)
        self.at = dict.fromkeys(range(workers), "")
        self.kept = {}  # (worker, episode) -> length, played and not written
        self.room = {}  # (worker, episode) -> room, where it has the turn
        self.written = {}  # domain -> lengths
        self.played_steps = 0
        self.clock = 0.0

    def run(self) -> None:
        clocks = [(0.0, worker) for worker in self.playing]
        while not self.schedule.is_complete():
            self.give()
            self.clock, worker = heapq.heappop(clocks)
            if self.deaths and self.rng.random() < 0.02:
                self.deaths -= 1
                self.die(worker)
                pause = 1.0
            else:
                pause = self.step(worker)
            heapq.heappush(clocks, (self.clock + pause, worker))
            assert self.clock < 1e7, "nobody gets any further"

    def give(self) -> None:
        for worker, episode in self.schedule.drop_surplus():
            self.kept.pop((worker, episode), None)
            if self.playing[worker] and self.playing[worker][0] == episode:
                self.playing[worker] = None
        for worker, episode, room in self.schedule.turns():
            before = sum(self.written.setdefault(episode.domain, []))
            assert room == self.transitions - before
            assert len(self.written[episode.domain]) == episode.number
            self.room[worker, episode] = room
            length = self.kept.pop((worker, episode), None)
            if length is not None:
                self.write(worker, episode, min(length, room))
        for worker, playing in self.playing.items():
            if playing is None:
                episode = self.schedule.hand_out(worker, self.at[worker])
                if episode:
                    self.playing[worker] = (episode, 0)
                    self.at[worker] = episode.domain

    def step(self, worker: int) -> float:
        if self.playing[worker] is None:
            return 1.0
        episode, steps = self.playing[worker]
        seconds = self.seconds[episode.domain]
        room = self.room.get((worker, episode), self.transitions)
        end = min(self.lengths(episode.domain, episode.number), room)
        more = min(10, end - steps)  # at once, or the simulation takes too long itself
        steps += more
        self.played_steps += more
        self.playing[worker] = (episode, steps)
        if steps >= end:
            self.playing[worker] = None
            if (worker, episode) in self.room:
                self.write(worker, episode, end)
            else:
                self.kept[worker, episode] = steps
                self.schedule.is_played(episode, steps)
        else:
            self.schedule.has_steps(episode, steps, seconds)
        return seconds * more

    def write(self, worker: int, episode: Episode, length: int) -> None:
        del self.room[worker, episode]
        self.written[episode.domain].append(length)
        self.schedule.is_written(episode, length)

    def die(self, worker: int) -> None:
        self.schedule.take_back(worker)
        self.playing[worker], self.at[worker] = None, ""
        self.kept = {key: length for key, length in self.kept.items() if key[0] != worker}
        self.room = {key: room for key, room in self.room.items() if key[0] != worker}

    def check(self, domains) -> None:
        for domain in domains:
            expected, missing = [], self.transitions
            while missing:
                expected.append(min(self.lengths(domain, len(expected)), missing))
                missing -= expected[-1]
            assert self.written[domain] == expected


@given(
    workers=st.integers(1, 9),
    domains=st.integers(1, 4),
    transitions=st.integers(1, 300),
    longest=st.integers(1, 80),
    deaths=st.integers(0, 8),
    seed=st.integers(0, 10**6),
    known=st.booleans(),
)
def test_every_domain_is_written_in_order_and_exactly(
    workers, domains, transitions, longest, deaths, seed, known
):
    names = [f"d{n}" for n in range(domains)]
    rng = random.Random(seed)
    table = {name: [rng.randint(1, longest) for _ in range(transitions)] for name in names}
    seconds = {name: rng.choice([0.1, 1.0]) for name in names}
    schedule = Schedule(
        dict.fromkeys(names, (0, 0)),
        transitions,
        episode_length=longest if known else None,
        action_repeat=2,
    )
    simulation = Simulation(
        schedule, workers, lambda d, e: table[d][e], seconds, transitions, rng, deaths
    )
    simulation.run()
    simulation.check(names)


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize(
    "seconds", [{"a": 1.0}, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0, "quadruped": 2.5}]
)
def test_workers_are_busy_to_the_end(workers, seconds):
    """Also with fewer domains than workers, and where one domain is slower than the others."""
    transitions, length = 6_000, 50
    schedule = Schedule(
        dict.fromkeys(seconds, (0, 0)), transitions, episode_length=length, action_repeat=2
    )
    simulation = Simulation(schedule, workers, lambda d, e: length, seconds, transitions)
    simulation.run()
    ideal = transitions * sum(seconds.values()) / workers
    assert simulation.clock < ideal / 0.9
    assert simulation.played_steps == transitions * len(seconds)  # nothing for nothing


@pytest.mark.parametrize("workers", [2, 8])
def test_little_is_played_for_nothing_where_episodes_end_at_random(workers):
    transitions = 5_000
    lengths = [random.Random(e).randint(5, 100) for e in range(transitions)]
    schedule = Schedule({"a": (0, 0)}, transitions, episode_length=None, action_repeat=2)
    simulation = Simulation(schedule, workers, lambda d, e: lengths[e], {"a": 1.0}, transitions)
    simulation.run()
    assert simulation.played_steps - transitions < 100 * workers
    assert simulation.clock < transitions / workers / 0.9 + 100


def test_a_domain_goes_on_from_what_is_there():
    schedule = Schedule({"a": (3, 40)}, 100, episode_length=30, action_repeat=2)
    assert schedule.hand_out(0, "") == Episode("a", 3)
    assert schedule.hand_out(1, "") == Episode("a", 4)
    assert schedule.turns() == [(0, Episode("a", 3), 60)]
    assert schedule.turns() == []
    assert schedule.counts() == {"a": 40}
    schedule.has_steps(Episode("a", 3), 7, 0.1)
    assert schedule.counts() == {"a": 47}


def test_an_error_counts_once_its_episode_is_needed():
    schedule = Schedule({"a": (0, 0)}, 100, episode_length=30, action_repeat=2)
    first, second = schedule.hand_out(0, ""), schedule.hand_out(1, "")
    schedule.has_failed(second, ValueError("here"))
    assert schedule.hand_out(1, "a") is None  # what lies behind is of no use
    assert schedule.turns() == [(0, first, 100)]
    schedule.is_written(first, 30)
    with pytest.raises(ValueError, match="here"):
        schedule.turns()


def test_an_error_behind_the_last_episode_is_none():
    schedule = Schedule({"a": (0, 0)}, 50, episode_length=30, action_repeat=2)
    first, second = schedule.hand_out(0, ""), schedule.hand_out(1, "")
    schedule.has_failed(second, ValueError("here"))
    schedule.turns()
    schedule.has_steps(first, 50, 0.1)
    assert schedule.drop_surplus() == [(1, second)]
    schedule.is_written(first, 50)
    assert schedule.is_complete()
    assert schedule.turns() == []
