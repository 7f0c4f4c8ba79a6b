"""Some rows of a batch, made by themselves: what the processes of a team do."""

from __future__ import annotations

import itertools

import pytest
import torch
from toy_replay import filled, write_episode

from crpt.replay import Batch, DomainSpec, ReplayBuffer


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def two_domains() -> ReplayBuffer:
    spec = DomainSpec(capacity=50, action_shape=(2,), state_shape=(1,), frame_shape=(1, 4, 4))
    buffer = ReplayBuffer.create(None, {"a": spec, "b": spec})
    for offset, name in enumerate("ab"):
        with buffer.writer(name) as writer:
            write_episode(writer, 100 * offset, 9)
    return buffer


def assert_rows(part: Batch, whole: Batch, rows: slice) -> None:
    for (name, found), (_, wanted) in zip(part.tensors(), whole.tensors(), strict=True):
        assert torch.equal(found, wanted[rows]), name


@pytest.mark.parametrize("source", ["buffer", "resident"])
@pytest.mark.parametrize("domain", ["a", {"a": 1.0, "b": 2.0}], ids=["one", "mixture"])
@pytest.mark.parametrize("cuts", [(0, 11), (0, 4, 11), (0, 1, 7, 7, 11)], ids=str)
def test_they_are_those_of_the_whole_batch(source, domain, cuts):
    buffer = two_domains()
    samples = buffer if source == "buffer" else buffer.resident("cpu")
    options = {"pad": 2, "n_step": 2, "gamma": 0.5}
    whole_batch = generator()
    whole = samples.sample(domain, 11, generator=whole_batch, **options)
    for begin, end in itertools.pairwise(cuts):
        own = generator()
        rows = slice(begin, end)
        part = samples.sample(domain, 11, generator=own, rows=rows, **options)
        assert len(part.obs) == end - begin
        assert_rows(part, whole, rows)
        assert torch.equal(own.get_state(), whole_batch.get_state())


def test_rows_that_are_found_by_listing_all_there_are():
    # Nearly all episodes are too short: most rows meet no transition by chance.
    spec = DomainSpec(capacity=3000, action_shape=(2,), state_shape=(1,), frame_shape=(1, 4, 4))
    buffer = ReplayBuffer.create(None, {"toy": spec})
    with buffer.writer("toy") as writer:
        write_episode(writer, 0, 6)
        for _ in range(1400):
            write_episode(writer, 10, 1)
    options = {"pad": 0, "n_step": 4, "gamma": 0.5}
    whole = buffer.sample("toy", 40, generator=generator(), **options)
    part = buffer.sample("toy", 40, generator=generator(), rows=slice(20, 40), **options)
    assert_rows(part, whole, slice(20, 40))


@pytest.mark.parametrize(
    "rows", [slice(-1, 3), slice(0, 12), slice(5, 4), slice(None, 3), slice(0, 4, 2), slice(0.0, 3)]
)
def test_rows_that_are_none_are_named(rows):
    with pytest.raises(ValueError, match=r"rows should be slice\(start, stop\) with .* <= 11, got"):
        filled(None).sample("toy", 11, rows=rows)


@pytest.mark.parametrize("rows", [(0, 3), 3, range(3)])
def test_rows_that_are_no_slice_are_named(rows):
    with pytest.raises(TypeError, match=r"rows should be a slice, got (tuple|int|range)"):
        filled(None).sample("toy", 11, rows=rows)
