"""Shared by all tests; with the promise that a GPU test cannot vanish: it skips by name, or fails
under CRPT_REQUIRE_CUDA=N where N GPUs are enough for it, wherever and for whatever it skips."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator, Iterator

import pytest

# Small arrays gain nothing from threads, and on a busy machine they wait for each other: NumPy's,
# and torch's. Here as well as before each test, for fixtures of modules come first.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import torch

torch.set_num_threads(1)

# A script's background job starts with Ctrl-C ignored, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def gpus_needed(item: pytest.Item) -> int:
    marker = item.get_closest_marker("cuda")
    return 0 if marker is None else marker.kwargs.get("devices", 1)


def gpus_required() -> int:
    text = os.environ.get("CRPT_REQUIRE_CUDA") or "0"
    if not text.isascii() or not text.isdigit():
        raise pytest.UsageError(f"CRPT_REQUIRE_CUDA should be a number of GPUs, got {text!r}")
    return int(text)


def pytest_configure() -> None:
    gpus_required()


def pytest_collection_finish() -> None:
    # Modules and tests are here to stay: collections, of which benches ask for one a measurement,
    # need not go through them each time.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = gpus_needed(item)
    if needed == 0:
        return
    from crpt.ops import cuda

    found = torch.cuda.device_count()
    if found < needed:
        pytest.skip("no GPU" if found == 0 else f"needs {needed} GPUs, and there are {found}")
    if not cuda.AVAILABLE:
        pytest.skip("crpt was built without CUDA kernels")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected_to_fail = hasattr(report, "wasxfail")
    if report.skipped and not expected_to_fail and 0 < gpus_needed(item) <= gpus_required():
        assert call.excinfo is not None
        report.outcome = "failed"
        report.longrepr = f"{call.excinfo.value}, and CRPT_REQUIRE_CUDA={gpus_required()}"
    return report


@pytest.fixture(autouse=True)
def _one_thread_and_restored_random_state() -> Iterator[None]:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.random.set_rng_state(state)
    torch.set_num_threads(threads)
