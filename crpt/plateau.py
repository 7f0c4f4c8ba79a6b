"""Noticing that pre-training sits on the trivial solution of its objective, or that the embeddings
have collapsed."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict, deque

from torch import Tensor

from crpt.config import PretrainConfig

# Closer than this to the trivial solution, the encoder learns next to nothing.
DISTANCE = 0.01
# Embeddings of a lower effective rank lie on a line, or in a point.
RANK = 1.5
# A run that leaves the plateau has left it after about 50 updates; before, nobody can tell.
SOONEST_UPDATES = 50
UPDATES = 150
# One batch may read far from the mean: those of so many rounds in a row have to agree.
READINGS = 3


class PlateauWarning(UserWarning):
    """The loss is no better than that of the trivial solution, or the embeddings have collapsed."""


class Plateau:
    """Warns once, of the domains stuck after 150 updates or at the end of a shorter run."""

    def __init__(self, config: PretrainConfig, updates_per_round: int) -> None:
        self.config = config
        self.first_round = min(math.ceil(UPDATES / updates_per_round), config.rounds)
        self.silent = self.first_round * updates_per_round < SOONEST_UPDATES
        self._distances: dict[str, deque[Tensor]] = defaultdict(lambda: deque(maxlen=READINGS))

    def observe(self, name: str, distance: Tensor) -> None:
        """A domain's distance from the trivial solution in a round; not read before it is judged,
        so that no round waits for a GPU."""
        self._distances[name].append(distance.detach())

    def check(self, round_: int, ranks: dict[str, float]) -> None:
        """Judges each domain by its largest distance of the last three rounds, of which a run that
        goes on has to see three first, and by the effective rank of z in this one."""
        if self.silent or round_ < self.first_round:
            return
        enough = min(READINGS, self.config.rounds)
        stuck = [
            name
            for name, recent in self._distances.items()
            if len(recent) >= enough and max(distance.item() for distance in recent) < DISTANCE
        ]
        collapsed = [name for name, rank in ranks.items() if rank < RANK]
        if stuck:
            found = f"the loss of {', '.join(stuck)} is no better than that of the trivial solution"
            if self.config.objective == "crptpro":
                found += f", uniform codes, log M = {math.log(self.config.prototypes):.3f}"
        elif collapsed:
            found = (
                f"the embeddings of {', '.join(collapsed)} have collapsed to about one dimension"
            )
        else:
            return
        self.silent = True
        warnings.warn(
            f"after {round_} rounds {found}: the encoder learns next to nothing there. "
            f"{self._remedy()}",
            PlateauWarning,
            stacklevel=3,
        )

    def _remedy(self) -> str:
        if self.config.embedding_norm == "batch":
            return "Try another learning_rate or a larger batch_size, in a new --run-dir."
        return (
            "Standardise the embeddings, embedding_norm: batch, in a new --run-dir: crpt.pretrain "
            "--embedding-norm batch, or crpt.train --pretrain.embedding-norm batch"
        )
