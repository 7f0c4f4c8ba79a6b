"""Files that are no episodes, or not like the others: named, and what came before is kept."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from toy_episodes import SIZE, directory, episode, imported, load, require_whole, save

from crpt.dataset import EpisodeFileError, import_episodes
from crpt.replay import DatasetError, ReplayBuffer


def pickled(path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "ran"),)

    arrays = load(path)
    arrays["physics"] = np.array([Bomb()], dtype=object)
    np.savez(path, **arrays)


def changed(**arrays):
    def change(path: Path) -> None:
        np.savez(path, **{k: v for k, v in {**load(path), **arrays}.items() if v is not None})

    return change


def cut(share: float):
    def change(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return change


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200] ^= 0x10  # within the compressed observation
    path.write_bytes(bytes(content))


def longer_than_it_is(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (7, 9, 10**6, 10**6)}
    )
    arrays = load(path)
    del arrays["observation"]
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("observation.npy", header.getvalue())


TALL = np.zeros((7, 9, 8, SIZE), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut(0.9), "cannot be read as an episode, it may be cut short"),
        (cut(0.0), "cannot be read as an episode"),
        (flipped, "cannot be read as an episode"),
        (pickled, "holds pickled Python objects"),
        (longer_than_it_is, r"observation.npy should have 63\d+ bytes, got"),
        (changed(reward=None), "keys should be observation, action, reward, discount"),
        (changed(observation=np.zeros((7, 24), np.float32)), "observation should be pixels"),
        (changed(observation=np.zeros((7, 8, 12, 12), np.uint8)), r"K\*3, H, W\], channels first"),
        (changed(observation=np.zeros((7, 12, 12, 9), np.uint8)), "channels first"),
        (changed(observation=np.zeros((5, 9, 12, 12), np.uint8)), "arrays should be 7 rows long"),
        (changed(observation=TALL), r"the frame shape should be \[3, 12, 12\] as before, got"),
        (changed(action=np.zeros((7, 3))), r"action shape should be \[2\] as before, got \[3\]"),
        (changed(physics=None), r"the state shape should be \[4\] as before, got \[0\]"),
        (changed(action=np.full((7, 2), np.nan)), "action 0 should be finite float32 numbers"),
        (changed(reward=np.full((7, 1), 1e300)), "reward 0 should be finite float32 numbers"),
        (changed(reward=np.zeros((7, 2))), r"reward should be \[7, 1\], got \[7, 2\]"),
        (changed(action=np.full((7, 2), "a")), "action should be numbers"),
        (changed(discount=np.full((7, 1), 1.5)), r"discounts should be in \[0, 1\], got 1.5"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_and_those_before_it_are_kept(tmp_path, change, message):
    directory(tmp_path / "npz")
    bad = sorted((tmp_path / "npz").iterdir())[1]
    change(bad)
    with pytest.raises(EpisodeFileError, match=message) as caught:
        imported(tmp_path / "ds", tmp_path / "npz")
    assert str(bad) in str(caught.value)
    assert not (tmp_path / "npz" / "ran").exists()
    require_whole(tmp_path / "ds", 1)
    bad.unlink()
    assert imported(tmp_path / "ds", tmp_path / "npz").episodes == 2
    require_whole(tmp_path / "ds", 3)


def test_a_stack_that_is_not_of_the_frames_before_is_named(tmp_path):
    for row, message in ((0, "observation 0 should be the episode's first"), (3, "observation 3")):
        arrays = episode(5, 0)
        arrays["observation"][row, 4, 2, 2] ^= 1
        path = save(tmp_path / f"npz{row}", 0, arrays)
        with pytest.raises(EpisodeFileError, match=message) as caught:
            imported(tmp_path / "ds", path.parent)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("20260101T000000_0_9.npz", "10 rows long, one more than its name says"),
        ("20260101T000000_0_0.npz", "an episode should be at least one transition long"),
        ("episode.npz", "should be named STAMP_INDEX_LENGTH.npz"),
    ],
)
def test_a_name_that_says_otherwise(tmp_path, name, message):
    save(tmp_path / "npz", 0, episode(5, 0), name)
    with pytest.raises(EpisodeFileError, match=message):
        imported(tmp_path / "ds", tmp_path / "npz")
    assert not (tmp_path / "ds").exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"file": "a"}', '{"file": "a", "checksums": 1}'])
def test_a_spoiled_list_of_what_was_imported_is_named(tmp_path, line):
    directory(tmp_path / "npz", 2)
    imported(tmp_path / "ds", tmp_path / "npz")
    ledger = tmp_path / "ds" / "toy" / "imported.jsonl"
    ledger.write_text(ledger.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(DatasetError, match=r"imported\.jsonl should have a line for each"):
        imported(tmp_path / "ds", tmp_path / "npz")
    require_whole(tmp_path / "ds", 2)


def test_no_episodes_no_directory_or_another_recording(tmp_path):
    directory(tmp_path / "npz", count=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"should have episodes named .* got none"):
        imported(tmp_path / "ds", tmp_path / "empty")
    with pytest.raises(NotADirectoryError, match=r"a directory of \.npz episodes"):
        imported(tmp_path / "ds", tmp_path / "nowhere")
    imported(tmp_path / "ds", tmp_path / "npz", render="exact")
    with pytest.raises(DatasetError, match="render 'exact', got 'fast'"):
        imported(tmp_path / "ds", tmp_path / "npz", render="fast")
    with ReplayBuffer.open(tmp_path / "ds").writer("toy", "grow") as writer:
        writer.begin(np.zeros((3, SIZE, SIZE), np.uint8))
        writer.append(np.zeros((3, SIZE, SIZE), np.uint8), [0, 0], 0, 1, last=True)
    with pytest.raises(DatasetError, match="holds 1 episodes that were not imported"):
        imported(tmp_path / "ds", tmp_path / "npz")


def test_no_source_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"sources should be at least one directory .* got none"):
        import_episodes(tmp_path / "data", [], domain="walker_walk")
    assert not (tmp_path / "data").exists()
