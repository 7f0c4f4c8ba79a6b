"""Streams of random numbers that have nothing to do with each other, out of one seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, stream: int) -> int:
    """A 32-bit seed for one of the streams of random numbers that a seed stands for.

    Those of neighbouring seeds and streams are unrelated.
    """
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn on the CPU within is the seed's; torch's random state stays as it is, that of
    its GPUs, too, which torch.manual_seed would set."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
