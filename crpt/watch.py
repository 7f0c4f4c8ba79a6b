"""Which update was the first to go wrong, kept where the updates are computed."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteWatch:
    """Counts updates, and remembers the first whose loss was not a finite number.

    `observe` never waits for the device; asking does.
    """

    def __init__(self, device: torch.device) -> None:
        self._updates = torch.zeros((), dtype=torch.int64, device=device)
        self._first_bad = torch.zeros((), dtype=torch.int64, device=device)

    def restart(self, updates: int) -> None:
        """As after so many updates, all of them good."""
        self._updates.fill_(updates)
        self._first_bad.zero_()

    @torch.no_grad()
    def observe(self, loss: Tensor) -> None:
        """The loss of the next update, a scalar."""
        self._updates.add_(1)
        first = ~loss.isfinite() & (self._first_bad == 0)
        self._first_bad.add_(first * self._updates)

    def first_bad(self) -> int | None:
        """The number of that update, counted from 1; None if there was none."""
        return int(self._first_bad.item()) or None
