"""Shared by all tests; with the promise that a GPU test cannot vanish: it skips by name, or fails
under CRPT_REQUIRE_CUDA=1."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Small arrays gain nothing from threads, and on a busy machine they wait for each other: NumPy's,
# and torch's. Here as well as before each test, for fixtures of modules come first.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import torch

torch.set_num_threads(1)

# A script's background job starts with Ctrl-C ignored, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    from crpt.ops import cuda

    if torch.cuda.is_available() and cuda.AVAILABLE:
        return
    reason = "no GPU" if not torch.cuda.is_available() else "crpt was built without CUDA kernels"
    if os.environ.get("CRPT_REQUIRE_CUDA") == "1":
        pytest.fail(f"{reason}, and CRPT_REQUIRE_CUDA=1")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _one_thread_and_restored_random_state() -> Iterator[None]:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.random.set_rng_state(state)
    torch.set_num_threads(threads)
