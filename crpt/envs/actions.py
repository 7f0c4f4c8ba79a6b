"""What every environment here checks of an action."""

from __future__ import annotations

import numpy as np

_TOLERANCE = 1e-6


def checked_action(action: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The action in float64; ValueError unless it is of that shape and in [-1, 1]."""
    action = np.asarray(action, np.float64)
    if action.shape != shape:
        raise ValueError(f"action should be {shape}, got {action.shape}")
    if not np.all(np.abs(action) <= 1.0 + _TOLERANCE):  # also catches NaN
        raise ValueError(f"action should be in [-1, 1], got {action}")
    return action
