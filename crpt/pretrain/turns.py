"""Which domains an update trains on: turns and shares by the domains' weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from crpt.config import PretrainConfig
from crpt.config.weights import in_lowest_terms
from crpt.pretrain.feeds import Domains


def smooth_round_robin(weights: Sequence[int]) -> Iterator[int]:
    """Whose turn it is, over and over: each gains its weight, the richest (the first of several)
    has the turn and pays all weights.

    So nobody is ever a whole turn ahead of its share, and after sum(weights) turns everybody has
    had as many as its weight. Equal weights take turns in their order.
    """
    total = sum(weights)
    credit = [0] * len(weights)
    while True:
        credit = [c + w for c, w in zip(credit, weights, strict=True)]
        richest = credit.index(max(credit))
        credit[richest] -= total
        yield richest


class Turns:
    """The domains of every update of a run: a function of the config and the update's number."""

    def __init__(self, config: PretrainConfig, domains: Domains) -> None:
        """domains: those to train on where the config names none."""
        names = config.domains or domains
        weights = in_lowest_terms(config.weights or (1,) * len(names))
        # Sorted: the order in which processes added them to the dataset must not matter.
        pairs = sorted(zip(names, weights, strict=True), key=lambda pair: pair[0])
        self.names: Domains = tuple(name for name, _ in pairs)
        """One that the config names twice is there twice."""
        self.weights = tuple(weight for _, weight in pairs)
        self.mixed = config.batches == "mixed"
        self.in_order = self.mixed or len(set(self.weights)) == 1
        """Whether all rounds are alike."""
        self._source = smooth_round_robin(self.weights)
        self._taken: list[int] = []

    @property
    def per_round(self) -> int:
        """Updates of a round."""
        return len(self.names)

    @property
    def repeat(self) -> bool:
        """Whether a round may have several updates on the same domains."""
        return len(self.names) > 1 and (
            self.mixed or not self.in_order or len(set(self.names)) < len(self.names)
        )

    @property
    def shares(self) -> tuple[int, ...]:
        """The weights of a batch's parts; none where it has one."""
        return self.weights if self.mixed else ()

    def of_round(self, round_: int) -> list[Domains]:
        """One batch for each name: all of them share it, or they take turns."""
        if self.mixed:
            return [self.names] * self.per_round
        if self.in_order:
            return [(name,) for name in self.names]
        end = (round_ + 1) * self.per_round
        self._taken += itertools.islice(self._source, max(0, end - len(self._taken)))
        return [(self.names[i],) for i in self._taken[end - self.per_round : end]]

    def after(self, updates: int) -> Iterator[Domains]:
        """The batches that follow so many updates, without end."""
        if self.mixed:
            return itertools.repeat(self.names)
        turns = itertools.islice(smooth_round_robin(self.weights), updates, None)
        return ((self.names[i],) for i in turns)

    def weight_of(self, domain: str) -> int:
        """Of the domain, beside those of the others; of one named twice, of both together."""
        return sum(w for name, w in zip(self.names, self.weights, strict=True) if name == domain)
