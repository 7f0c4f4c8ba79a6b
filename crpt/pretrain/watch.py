"""Which update was the first to go wrong, kept where the updates are computed."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteWatch:
    """Counts updates, and remembers the first whose loss was not a finite number.

    `observe` never waits for the device; asking does.
    """

    def __init__(self, device: torch.device) -> None:
        # 0 as long as all losses were finite, then NaN for good: so few kernels do it.
        self._trouble = torch.zeros((), device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)

    def restart(self, updates: int) -> None:
        """As after so many updates, all of them good."""
        self._trouble.zero_()
        self._good.fill_(updates)

    @torch.no_grad()
    def observe(self, loss: Tensor) -> None:
        """The loss of the next update, a scalar."""
        self._trouble.add_(loss * 0)
        self._good.add_(self._trouble == 0)

    def first_bad(self) -> int | None:
        """The number of that update, counted from 1; None if there was none."""
        return int(self._good.item()) + 1 if bool(self._trouble.isnan()) else None
