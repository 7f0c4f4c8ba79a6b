"""Devices, and the promise that a GPU test cannot vanish: it skips by name, or fails under
CRPT_REQUIRE_CUDA=1."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks, started

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


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


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    """Every test starts from one seed; random state and thread count are as before afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three gloo processes, started when the first test asks for them."""
    with started(str(tmp_path_factory.mktemp("ranks") / "store")) as three:
        yield three
