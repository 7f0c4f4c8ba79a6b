"""Readers beside datasets whose files become longer or shorter."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from toy_replay import filled, write_episode

from crpt import replay
from crpt.replay import DomainSpec, ReplayBuffer
from crpt.replay.store import Store


def test_a_dataset_can_be_opened_while_its_files_change_length(tmp_path):
    path = tmp_path / "data"
    filled(path, episodes=1)
    done = threading.Event()

    def resize() -> None:
        with ReplayBuffer.open(path).writer("toy", when_full="grow") as writer:
            while not done.is_set():
                writer.fit(3000)
                writer.fit(1)

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        for _ in range(300):
            assert ReplayBuffer.open(path).num_transitions("toy") == 6
    finally:
        done.set()
        thread.join()


@pytest.fixture
def growing(tmp_path, monkeypatch):
    """A domain of 9 slots whose writer adds more between a reader's mapping and its next look."""
    filled(tmp_path / "data", episodes=1, capacity=9)
    writer = ReplayBuffer.open(tmp_path / "data").writer("toy", when_full="grow")
    monkeypatch.setattr("crpt.replay.writer._GROWTH", 9)
    mapped = Store._map
    moments = iter((True, False))

    def map_then_grow(store):
        mapped(store)
        if store.access == "read" and next(moments, False):
            write_episode(writer, 100, 6)
            write_episode(writer, 200, 6)

    def arm():
        monkeypatch.setattr(Store, "_map", map_then_grow)

    yield tmp_path / "data", writer, arm
    writer.close()


def test_opening_just_while_the_files_grow(growing):
    path, _, arm = growing
    arm()
    assert ReplayBuffer.open(path).num_transitions("toy") == 18


def test_looking_just_while_the_files_grow_again(growing):
    path, writer, arm = growing
    reader = ReplayBuffer.open(path)
    write_episode(writer, 50, 6)
    arm()
    store = reader._store("toy")
    seen = store.ring().transitions(1, 3)  # of what is mapped, though more is there by now
    assert store.capacity < store.ring().head()
    assert 0 < len(seen) < 24
    assert reader.num_transitions("toy") == 24  # and then all of it


# Readers beside files that become shorter: what they mapped behind the end is a fatal signal


@pytest.fixture
def shortened(tmp_path) -> tuple[Path, ReplayBuffer]:
    """A reader that mapped 3,000 slots, of which 28 are left."""
    path = tmp_path / "data"
    filled(path, capacity=3000)
    reader = ReplayBuffer.open(path)
    assert reader.num_transitions("toy") == 24
    with ReplayBuffer.open(path).writer("toy", when_full="grow") as writer:
        writer.fit(0)
    return path, reader


def test_a_reader_copies_what_is_left(shortened):
    _, reader = shortened
    assert reader.resident("cpu").num_transitions("toy") == 24
    assert reader.capacity("toy") == 28


def test_a_reader_follows_a_ring_that_goes_round_sooner_now(shortened):
    path, reader = shortened
    with ReplayBuffer.open(path).writer("toy") as writer:
        for e in range(100):  # past the page that the stamps now end in
            write_episode(writer, e, 6)
    assert reader.num_transitions("toy") == ReplayBuffer.open(path).num_transitions("toy") == 24
    assert len(reader.sample("toy", 64).reward) == 64


@pytest.mark.parametrize("name", ["frames", "rewards", "stamps"])
def test_a_file_cut_short_while_it_is_open_is_named(tmp_path, name):
    buffer = filled(tmp_path / "data")
    os.truncate(tmp_path / "data/toy" / f"{name}.npy", 200)
    for use in (lambda: buffer.sample("toy", 4), lambda: buffer.arrays("toy")):
        with pytest.raises(replay.DatasetCorruptError, match=rf"{name}.npy is cut short"):
            use()


def test_a_domain_is_not_made_shorter_than_its_steps(tmp_path):
    filled(tmp_path / "data")
    with ReplayBuffer.open(tmp_path / "data").writer("toy", when_full="grow") as writer:
        with pytest.raises(ValueError, match="more should be at least 0, got -1"):
            writer.fit(-1)
        writer.fit(0)
    assert ReplayBuffer.open(tmp_path / "data").num_transitions("toy") == 24


def test_a_file_cut_between_mapping_and_the_first_look_is_named(tmp_path, monkeypatch):
    """Not a fatal signal: the stamps behind the end are on no page."""
    spec = DomainSpec(capacity=4000, action_shape=(1,), frame_shape=(1, 4, 4))
    ReplayBuffer.create(tmp_path / "ds", {"toy": spec})
    mapped = Store._map

    def cut_after(self):
        mapped(self)
        os.truncate(tmp_path / "ds" / "toy" / "stamps.npy", 128)

    monkeypatch.setattr(Store, "_map", cut_after)
    with pytest.raises(replay.DatasetCorruptError):
        ReplayBuffer.open(tmp_path / "ds")
