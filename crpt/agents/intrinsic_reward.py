"""Reward for reaching what the prototypes have seldom seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import crpt.ops


class IntrinsicReward:
    """r(z) = distance from z to its third nearest in a queue of embeddings drawn by the prototypes.

    For every prototype one z of the batch is drawn, with probability softmax over the batch of
    their similarity, and pushed into the queue, first in, first out (arXiv 2302.05614, section
    III; after Yarats et al., 2021).
    """

    def __init__(
        self, prototypes: Tensor, queue_size: int, neighbour: int = 3, *, seed: int
    ) -> None:
        m, dim = prototypes.shape
        if not neighbour <= m <= queue_size:
            raise ValueError(
                f"queue_size should be at least the {m} prototypes, and these at least "
                f"{neighbour}, got {queue_size}"
            )
        self.prototypes = prototypes
        self.neighbour = neighbour
        self.queue = prototypes.new_zeros(queue_size, dim)
        self.filled = 0
        self.cursor = 0
        # On the CPU, so that a checkpoint of one kind of device goes on on another.
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Push the draws of this batch, then measure it: z [B, D] of unit length -> [B]."""
        self._push(z)
        return crpt.ops.knn_distance(z, self.queue[: self.filled], self.neighbour)

    def _push(self, z: Tensor) -> None:
        similarity = crpt.ops.prototype_similarity(z, self.prototypes)  # [B, M]
        probability = similarity.T.softmax(dim=-1)  # [M, B]
        seed = int(torch.randint(2**31, (), generator=self.generator))
        generator = torch.Generator(z.device).manual_seed(seed)
        drawn = torch.multinomial(probability, 1, generator=generator).squeeze(-1)
        slots = torch.arange(self.cursor, self.cursor + len(drawn), device=z.device)
        self.queue[slots % len(self.queue)] = z[drawn]
        self.cursor = (self.cursor + len(drawn)) % len(self.queue)
        self.filled = min(self.filled + len(drawn), len(self.queue))

    def state(self) -> dict[str, Any]:
        return {
            "queue": self.queue,
            "filled": self.filled,
            "cursor": self.cursor,
            "generator": self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.queue.copy_(state["queue"])
        self.filled = state["filled"]
        self.cursor = state["cursor"]
        self.generator.set_state(state["generator"])
