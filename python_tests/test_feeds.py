"""The feeds of a GPU, on a CPU: the same batches as the buffer's own, in the same order."""

from __future__ import annotations

import threading
import weakref

import pytest
import small
import torch

from crpt.pretrain.feeds import ResidentFeed, StagingBuffers, ViewConfig, fits, frame_bytes, parts
from crpt.pretrain.streamed_feed import StreamedFeed

CPU = torch.device("cpu")
DOMAINS = ("dot_blue", "dot_red")
SEQUENCES = {"alternate": [("dot_blue",), ("dot_red",)], "mixed": [DOMAINS, DOMAINS]}


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data") / "dataset")


def config(pad: int = 2, rows: slice = slice(0, 7)) -> ViewConfig:
    return ViewConfig(7, 3, pad, torch.float32, rows)


def feed(kind: str, buffer, sequence, generator, views=None):
    views = views or config()
    if kind == "resident":
        return ResidentFeed(buffer, DOMAINS, views, CPU, generator)
    return StreamedFeed(buffer, sequence, views, CPU, generator)


def expected(buffer, domains, generator, pad=2):
    """The batch of `sample`, one call a domain."""
    batches = [
        buffer.sample(
            part.domain, part.end - part.begin, pad=pad, dtype=torch.float32, generator=generator
        )
        for part in parts(domains, 7)
    ]
    return torch.cat([b.obs for b in batches]), torch.cat([b.next_obs for b in batches])


def drawn(source, domains):
    source.draw(domains)
    return source.views(domains)


def assert_same(views, wanted, rows: slice = slice(None)):
    for got, want in zip(views, wanted, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want[rows], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize("batches", ["alternate", "mixed"])
@pytest.mark.parametrize("pad", [0, 2])
def test_batches_and_generator_are_those_of_sample(buffer, kind, batches, pad):
    sequence = SEQUENCES[batches]
    own, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    source = feed(kind, buffer, sequence, own, config(pad))
    for domains in sequence * 4:
        assert_same(drawn(source, domains), expected(buffer, domains, other, pad))
        assert torch.equal(own.get_state(), other.get_state())


@pytest.mark.parametrize("kind", ["resident", "streamed"])
@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_a_rank_gathers_its_own_rows(buffer, kind, batches):
    sequence = SEQUENCES[batches]
    for rows in (slice(0, 2), slice(2, 5), slice(5, 7)):  # of a mixed batch in one part, or in two
        own, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
        source = feed(kind, buffer, sequence, own, config(rows=rows))
        for domains in sequence * 2:
            assert_same(drawn(source, domains), expected(buffer, domains, other), rows)
            assert torch.equal(own.get_state(), other.get_state())


def test_a_rank_sends_no_more_than_its_rows(buffer, monkeypatch):
    sent = []
    send = StagingBuffers.send
    monkeypatch.setattr(
        StagingBuffers, "send", lambda self, to: (sent.append(to.numel()), send(self, to))
    )
    own = torch.Generator().manual_seed(5)
    source = feed("streamed", buffer, [DOMAINS], own, config(rows=slice(2, 5)))
    source.draw(DOMAINS)
    source.close()
    assert set(sent) == {2 * 3 * 9 * 20 * 20}


def test_what_was_drawn_ahead_is_dropped_where_something_else_is_asked_for(buffer):
    sequence = SEQUENCES["alternate"]
    own, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    source = feed("streamed", buffer, sequence, own)
    for domains in (*sequence, sequence[1], sequence[1], DOMAINS, *sequence):
        assert_same(drawn(source, domains), expected(buffer, domains, other))
    state = own.get_state()
    first = expected(buffer, sequence[0], torch.Generator().set_state(state))
    assert_same(drawn(source, sequence[0]), first)
    own.set_state(state)  # as a checkpoint does
    assert_same(drawn(source, sequence[0]), first)


def test_the_thread_ends_with_the_feed_and_passes_errors_on(buffer, monkeypatch):
    def threads():
        return sum(t.name == "crpt-feed" for t in threading.enumerate())

    before = threads()
    own = torch.Generator().manual_seed(5)
    source = feed("streamed", buffer, SEQUENCES["alternate"], own)
    source.draw(("dot_blue",))
    assert threads() == before + 1
    del source
    assert threads() == before

    def broken(*args, **options):
        raise OSError("the disk is gone")

    source = feed("streamed", buffer, SEQUENCES["alternate"], own)
    monkeypatch.setattr(type(buffer), "sample", broken)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            source.draw(("dot_blue",))


def test_a_buffer_is_written_again_only_when_the_device_has_read_it():
    class Event:
        waited = 0

        def synchronize(self):
            self.waited += 1

    ring = StagingBuffers([torch.zeros(2), torch.zeros(2)], CPU)
    to, events = torch.zeros(2), [Event(), Event()]
    for value, event in zip((1.0, 2.0), events, strict=True):
        ring.writable().fill_(value)
        ring.send(to)
        assert to.tolist() == [value] * 2
        ring._sent[ring._turn - 1] = event
    assert [e.waited for e in events] == [0, 0]
    ring.writable().fill_(3.0)
    assert [e.waited for e in events] == [1, 0]


def test_the_bytes_of_the_frames_are_those_that_are_filled(buffer):
    frames = sum(len(buffer.arrays(d)["frames"][: buffer.cursor(d)]) for d in DOMAINS)
    assert frame_bytes(buffer, DOMAINS) == frames * 3 * 20 * 20


def test_frames_fit_where_they_leave_room_for_the_updates(buffer, monkeypatch):
    needed = frame_bytes(buffer, DOMAINS)
    for share, fit in ((0.5, True), (0.75, False), (2.0, False)):
        free = int(needed / share)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert fits(buffer, DOMAINS, CPU) is fit


def test_frames_of_a_finished_run_are_not_in_the_way(buffer, monkeypatch):
    class Run:
        def __init__(self):
            self.itself = self

    finished, order = weakref.ref(Run()), []

    def mem_get_info(device):
        order.append("asked of the driver" if finished() is None else "it is still there")
        return 1 << 40, 1 << 41

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert fits(buffer, DOMAINS, CPU)
    assert order == ["emptied", "asked of the driver"]


@pytest.mark.parametrize(("count", "batch"), [(1, 7), (2, 7), (3, 8), (3, 3)])
def test_parts_cover_the_batch_in_equal_shares(count, batch):
    found = parts(tuple("abc"[:count]), batch)
    assert [p.begin for p in found] == [0, *(p.end for p in found[:-1])]
    assert found[-1].end == batch
    sizes = [p.end - p.begin for p in found]
    assert max(sizes) - min(sizes) <= 1


def test_each_row_of_a_batch_is_in_one_part():
    rows = slice(3, 6)
    found = [
        row
        for part in parts(("a", "b", "c", "d"), 8)
        for row in range(8)[part.begin : part.end][part.of(rows)]
    ]
    assert found == [3, 4, 5]
    for part in parts(("a", "b", "c", "d"), 8):  # also where it has none of them
        assert 0 <= part.of(rows).start <= part.of(rows).stop <= 2


def numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("index", "shifts", "error", "message"),
    [
        ([1], numbers(2, 4, 2), TypeError, "index should be a Tensor, got list"),
        (numbers(2, 4, 3).float(), numbers(2, 4, 2), TypeError, "index .* got torch.float32"),
        (numbers(4, 3), numbers(2, 4, 2), ValueError, r"index should be \[2, B, K\], got \[4, 3\]"),
        (numbers(3, 4, 3), numbers(2, 4, 2), ValueError, r"index .* got \[3, 4, 3\]"),
        (numbers(2, 4, 3), numbers(2, 5, 2), ValueError, r"shifts .* \[2, 4, 2\], got \[2, 5, 2\]"),
        (numbers(2, 4, 6)[..., ::2], numbers(2, 4, 2), ValueError, "index should be contiguous"),
        (numbers(2, 4, 3), numbers(2, 4, 2).to("meta"), ValueError, "shifts .* cpu, got .* meta"),
    ],
)
def test_numbers_that_cannot_be_drawn_are_named(buffer, index, shifts, error, message):
    with pytest.raises(error, match=message):
        buffer.resident(CPU).draw("dot_red", index, shifts)
