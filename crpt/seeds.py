"""Seeds that have nothing to do with each other, out of one."""

from __future__ import annotations

import numpy as np


def stream_seed(seed: int, stream: int) -> int:
    """A 32-bit seed for one of the streams of random numbers that a seed stands for.

    Those of neighbouring seeds and streams are unrelated.
    """
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])
