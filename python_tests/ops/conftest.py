"""The devices that tests run on, and random state that is as before after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks, started

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


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
