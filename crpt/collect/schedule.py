"""Which episode is played next, and whose turn it is to be written: no processes, only numbers.

Any number of workers play episodes of one domain at once, ahead of what is known: an episode's
length shows only as it is played. They are written in order, one at a time, until the domain has
all its transitions; what was played beyond is dropped.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import NamedTuple

_USUAL_EPISODE = 1000  # environment steps, until an episode's end was seen


class Episode(NamedTuple):
    """One episode of a domain, by number."""

    domain: str
    number: int


@dataclass
class _Flight:
    """An episode that was handed out and not yet written."""

    worker: int
    steps: int = 0
    played: bool = False
    has_turn: bool = False
    error: Exception | None = None


@dataclass
class _Domain:
    """What is known of one domain's episodes."""

    missing: int
    """Transitions not yet written."""
    head: int
    """The episode to be written next."""
    fresh: int
    """The first that was never handed out."""
    seconds_per_step: float | None = None
    returned: list[int] = field(default_factory=list)  # a heap
    flights: dict[int, _Flight] = field(default_factory=dict)

    lengths: tuple[int, int] = (0, 0)
    """Episodes whose length was seen, and the sum of their lengths."""

    def see_length(self, steps: int) -> None:
        self.lengths = (self.lengths[0] + 1, self.lengths[1] + steps)


class Schedule:
    """Hands out episodes to workers, and the turn to write them."""

    def __init__(
        self,
        written: dict[str, tuple[int, int]],
        transitions: int,
        *,
        episode_length: int | None,
        action_repeat: int,
    ) -> None:
        """`written`: for each domain the number of episodes and transitions that it has."""
        self._transitions = transitions
        self._prior = episode_length or max(_USUAL_EPISODE // action_repeat, 1)
        self._domains = {
            name: _Domain(transitions - have, episodes, episodes, lengths=(episodes, have))
            for name, (episodes, have) in written.items()
        }

    def is_complete(self) -> bool:
        return not any(domain.missing for domain in self._domains.values())

    def hand_out(self, worker: int, at: str) -> Episode | None:
        """The next episode for a worker that has an environment of the domain `at`."""
        wanting = {name: self._unassigned(name) for name in self._domains}
        wanting = {name: count for name, count in wanting.items() if count > 0}
        if not wanting:
            return None
        if at not in wanting:
            at = max(wanting, key=lambda name: self._urgency(name, wanting[name]))
        domain = self._domains[at]
        if domain.returned:
            number = heapq.heappop(domain.returned)
        else:
            number, domain.fresh = domain.fresh, domain.fresh + 1
        domain.flights[number] = _Flight(worker)
        return Episode(at, number)

    def take_back(self, worker: int) -> None:
        """The worker is gone, and what it played and did not write with it."""
        for domain in self._domains.values():
            for number in [n for n, flight in domain.flights.items() if flight.worker == worker]:
                del domain.flights[number]
                heapq.heappush(domain.returned, number)

    def holds(self, worker: int, episode: Episode) -> bool:
        """Whether the worker has this episode: it was neither taken back nor dropped."""
        flight = self._domains[episode.domain].flights.get(episode.number)
        return flight is not None and flight.worker == worker

    def has_steps(self, episode: Episode, steps: int, seconds_per_step: float) -> None:
        """An episode has got that far, at that rate."""
        domain = self._domains[episode.domain]
        domain.flights[episode.number].steps = steps
        domain.seconds_per_step = seconds_per_step

    def is_played(self, episode: Episode, steps: int) -> None:
        """An episode was played to its end, and waits for its turn."""
        domain = self._domains[episode.domain]
        flight = domain.flights[episode.number]
        flight.steps, flight.played = steps, True
        domain.see_length(steps)

    def is_written(self, episode: Episode, steps: int) -> None:
        """The head of a domain is on disk."""
        domain = self._domains[episode.domain]
        assert episode.number == domain.head, episode
        flight = domain.flights.pop(episode.number)
        if not flight.played:
            domain.see_length(steps)
        domain.head += 1
        domain.missing -= steps

    def has_failed(self, episode: Episode, error: Exception) -> None:
        """An episode cannot be played: an error if it is needed, once those before are written."""
        flight = self._domains[episode.domain].flights[episode.number]
        flight.error, flight.played = error, True

    def turns(self) -> list[tuple[int, Episode, int]]:
        """Heads that may be written from now on: worker, episode, transitions still missing.

        Raises the error of a head that has failed.
        """
        given = []
        for name, domain in self._domains.items():
            flight = domain.flights.get(domain.head)
            if domain.missing and flight and flight.error:
                raise flight.error
            if domain.missing and flight and not flight.has_turn:
                flight.has_turn = True
                given.append((flight.worker, Episode(name, domain.head), domain.missing))
        return given

    def drop_surplus(self) -> list[tuple[int, Episode]]:
        """Episodes behind the last one that is needed, with the workers that have them."""
        dropped = []
        for name, domain in self._domains.items():
            last = self._last_needed(domain)
            if last is None:
                continue
            for number in [n for n in domain.flights if n > last]:
                dropped.append((domain.flights.pop(number).worker, Episode(name, number)))
            domain.returned = [n for n in domain.returned if n <= last]
            heapq.heapify(domain.returned)
            domain.fresh = min(domain.fresh, last + 1)
        return dropped

    def written(self, domain: str) -> int:
        """Transitions of the domain that are on disk."""
        return self._transitions - self._domains[domain].missing

    def counts(self) -> dict[str, int]:
        """Transitions of each domain, played ones included; all only when all are written."""
        played = {
            name: sum(flight.steps for flight in domain.flights.values())
            for name, domain in self._domains.items()
        }
        return {
            name: self._transitions - max(domain.missing - played[name], domain.missing > 0)
            for name, domain in self._domains.items()
        }

    def turns_of(self, worker: int) -> list[Episode]:
        """The episodes that the worker may be writing."""
        return [
            Episode(name, number)
            for name, domain in self._domains.items()
            for number, flight in domain.flights.items()
            if flight.worker == worker and flight.has_turn
        ]

    def _last_needed(self, domain: _Domain) -> int | None:
        """The episode in which all missing transitions are together, if that was seen."""
        number, missing = domain.head - 1, domain.missing
        while missing > 0:
            number += 1
            if number not in domain.flights:
                return None
            missing -= domain.flights[number].steps
        return number

    def _unassigned(self, name: str) -> float:
        """Transitions that nobody plays, as far as one can know; something where one must."""
        domain = self._domains[name]
        usual = self._usual(name)
        expected = sum(
            flight.steps if flight.played else max(flight.steps, usual)
            for flight in domain.flights.values()
        )
        if domain.returned:
            return max(domain.missing - expected, 1)
        failed = any(flight.error for flight in domain.flights.values())
        return 0 if failed else domain.missing - expected

    def _urgency(self, name: str, count: float) -> tuple[bool, float]:
        """Where another worker helps most: others may wait for what a dead one left; else by time
        to go."""
        domain = self._domains[name]
        known = [d.seconds_per_step for d in self._domains.values() if d.seconds_per_step]
        usual = sum(known) / len(known) if known else 1.0
        seconds = count * (domain.seconds_per_step or usual)
        players = sum(not flight.played for flight in domain.flights.values())
        return bool(domain.returned), seconds / (1 + players)

    def _usual(self, name: str) -> float:
        """The length to expect of an episode."""
        episodes, steps = self._domains[name].lengths
        return steps / episodes if steps else self._prior
