"""Noticing that pre-training sits on the trivial solution of its objective or does worse, or that
the embeddings or the prototypes have collapsed."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

from crpt.config import PretrainConfig

# Closer than this to the trivial solution, the encoder learns next to nothing; a loss that is
# further above it is worse.
DISTANCE = 0.01
# Where the codes are uniform, a loss that is no further above log M is still coming down to it.
DISTANCE_OF_UNIFORM = 0.1
# Embeddings of a lower effective rank lie on a line, or in a point.
RANK = 1.5
# So few rows of a mixed batch have a low rank whatever they are: at most one less than there are.
FEWEST_ROWS = 8
# Codes whose perplexity is this share of M are as good as uniform.
UNIFORM = 0.9
# Prototypes with this mean cosine lie 45 degrees from one direction. They begin with about 0, and
# the comparison loss does not draw them together: it stays the same when all move by one vector.
# Healthy runs, some of thousands of updates, had 0.13 at most, also with intrinsic: none, and one
# that diverged at learning rate 0.1 had 0.17. The largest cosine tells nothing, for two of many may
# be near, nor do those in use: on the plateau that is one, of spread ones.
SIMILARITY = 0.5
# Fewer than these drift further in healthy runs: 4 of them to 0.7, and 2 to 0.96.
FEWEST_PROTOTYPES = 16
# A run that leaves the plateau has left it after about 50 updates; before, nobody can tell.
SOONEST_UPDATES = 50
UPDATES = 150
# One batch may read far from the mean: those of so many rounds in a row have to agree.
READINGS = 3

Trouble = Literal["stuck", "worse", "collapsed", "prototypes collapsed"]


class PlateauWarning(UserWarning):
    """The loss is no better than that of the trivial solution, or the embeddings or the prototypes
    have collapsed."""


class Plateau:
    """Warns of the domains in trouble after 150 updates, or at the end of a shorter run, and later
    of those that get into it: once for each domain and trouble. Of prototypes that have collapsed,
    which belong to no domain, it warns once, at any time."""

    def __init__(self, config: PretrainConfig, updates_per_round: int) -> None:
        self.config = config
        self.first_round = min(math.ceil(UPDATES / updates_per_round), config.rounds)
        self.silent = self.first_round * updates_per_round < SOONEST_UPDATES
        self._distances: dict[str, deque[Tensor]] = defaultdict(lambda: deque(maxlen=READINGS))
        self._told: set[tuple[Trouble, str]] = set()

    def observe(self, name: str, distance: Tensor) -> None:
        """A domain's distance from the trivial solution in a round; not read before it is judged,
        so that no round waits for a GPU."""
        self._distances[name].append(distance.detach())

    def check(
        self,
        round_: int,
        ranks: Mapping[str, float],
        perplexities: Mapping[str, float] | None = None,
        similarity: float | None = None,
    ) -> None:
        """Judges each domain by its largest distance of the last three rounds, of which a run that
        goes on has to see three first, and by the effective rank of z and the perplexity of the
        codes, of an objective that has some, in this one; and prototypes by the mean cosine of two
        of them."""
        if self._are_one(similarity) and self._news("prototypes collapsed", ["prototypes"]):
            _warn(
                f"after {round_} rounds the prototypes have collapsed to about one vector: two of "
                f"them have a mean cosine of {similarity:.2f}, and about 0 where they are spread. "
                f"{self._remedy_of_prototypes()}"
            )
        if self.silent or round_ < self.first_round:
            return
        distances, perplexities = self._largest_distances(), perplexities or {}
        above = {
            d: DISTANCE_OF_UNIFORM if self._is_uniform(perplexities.get(d, 0)) else DISTANCE
            for d in distances
        }
        stuck = self._news("stuck", (d for d, x in distances.items() if -above[d] < x < DISTANCE))
        worse = self._news("worse", (d for d, x in distances.items() if x <= -above[d]))
        # On the plateau embeddings shrink sooner or later: no news of a domain that is stuck there.
        flat = (d for d, rank in ranks.items() if rank < RANK and ("stuck", d) not in self._told)
        collapsed = self._news("collapsed", flat)
        if stuck or collapsed:
            found = [self._stuck(stuck, perplexities)] if stuck else []
            if collapsed:
                found.append(
                    f"the embeddings of {', '.join(collapsed)} have collapsed to about one "
                    "dimension"
                )
            _warn(
                f"after {round_} rounds {', and '.join(found)}: the encoder learns next to nothing "
                f"there. {self._remedy()}"
            )
        if worse:
            by = ", ".join(f"{name} (by {-distances[name]:.3f})" for name in worse)
            _warn(
                f"after {round_} rounds the loss of {by} is above that of the trivial solution: "
                f"training diverges, or has hardly begun. {self._remedy_of_worse()}"
            )

    def _largest_distances(self) -> dict[str, float]:
        """Of the last rounds, of the domains that have been seen in enough of them."""
        enough = min(READINGS, self.config.rounds)
        return {
            name: max(distance.item() for distance in recent)
            for name, recent in self._distances.items()
            if len(recent) >= enough
        }

    def _news(self, trouble: Trouble, names: Iterable[str]) -> list[str]:
        """Those that were not told of before; from now on they were."""
        new = [name for name in names if (trouble, name) not in self._told]
        self._told |= {(trouble, name) for name in new}
        return new

    def _stuck(self, names: list[str], perplexities: Mapping[str, float]) -> str:
        found = f"the loss of {', '.join(names)} is no better than that of the trivial solution"
        known = [perplexities[name] for name in names if name in perplexities]
        if not known:
            return found
        m = self.config.prototypes
        found += f", log M = {math.log(m):.3f}"
        if self._is_uniform(min(known)):
            return f"{found}, and the codes are uniform"
        return f"{found}, though the codes are not uniform (perplexity {min(known):.1f} of {m})"

    def _are_one(self, similarity: float | None) -> bool:
        enough = self.config.prototypes >= FEWEST_PROTOTYPES
        return similarity is not None and enough and similarity >= SIMILARITY

    def _is_uniform(self, perplexity: float) -> bool:
        return perplexity >= UNIFORM * self.config.prototypes

    def _remedy(self) -> str:
        if self.config.embedding_norm == "batch":
            return "Try another learning_rate or a larger batch_size, in a new --run-dir."
        return (
            "Standardise the embeddings, embedding_norm: batch, in a new --run-dir: crpt.pretrain "
            "--embedding-norm batch, or crpt.train --pretrain.embedding-norm batch"
        )

    def _remedy_of_prototypes(self) -> str:
        """The intrinsic loss pushes them apart, and a new run begins with spread ones."""
        c = self.config
        weight = f"an intrinsic_weight above {c.intrinsic_weight:g}"
        apart = weight if c.intrinsic != "none" else "intrinsic: dot"
        return f"Try {apart}, or a learning_rate below {c.learning_rate:g}, in a new --run-dir."

    def _remedy_of_worse(self) -> str:
        return (
            f"If it rises, try a learning_rate below {self.config.learning_rate:g}, if it falls, "
            "more rounds; in a new --run-dir."
        )


def _warn(message: str) -> None:
    warnings.warn(message, PlateauWarning, stacklevel=4)
