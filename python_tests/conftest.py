"""Shared by all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

# A script's background job starts with Ctrl-C ignored, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread_and_restored_random_state() -> Iterator[None]:
    """Small tensors gain nothing from threads, and on a busy machine they wait for each other."""
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.random.set_rng_state(state)
    torch.set_num_threads(threads)
