"""Episodes as DrQ-v2, URLB and ExORL keep them, made up."""

from __future__ import annotations

import filecmp
import io
from pathlib import Path

import numpy as np

from crpt.dataset import (
    import_episodes,
    verify,
)

SIZE = 12


def episode(length: int, seed: int, *, stack: int = 3, state: int | None = 4) -> dict:
    """As DrQ-v2's ReplayBufferStorage has it before it saves it."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (length + 1, 3, SIZE, SIZE), np.uint8)
    rows = np.arange(length + 1)
    stacks = [frames[np.maximum(rows - back, 0)] for back in reversed(range(stack))]
    action = rng.uniform(-1, 1, (length + 1, 2)).astype(np.float32)
    reward = rng.normal(size=(length + 1, 1)).astype(np.float32)
    discount = np.ones((length + 1, 1), np.float32)
    action[0], reward[0] = 0, 0
    discount[-1] = seed % 2
    arrays = {
        "observation": np.concatenate(stacks, axis=1),
        "action": action,
        "reward": reward,
        "discount": discount,
    }
    if state is not None:
        arrays["physics"] = rng.normal(size=(length + 1, state))
    return arrays


def save(folder: Path, index: int, arrays: dict, name: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    length = len(arrays["action"]) - 1
    path = folder / (name or f"20260101T{index:06d}_{index}_{length}.npz")
    with io.BytesIO() as stream:
        np.savez_compressed(stream, **arrays)
        path.write_bytes(stream.getvalue())
    return path


def directory(folder: Path, count: int = 4, **how) -> list[dict]:
    made = [episode(5 + i, i, **how) for i in range(count)]
    for i, arrays in enumerate(made):
        save(folder, i, arrays)
    return made


def load(path: Path) -> dict:
    with np.load(path) as archive:
        return {key: archive[key] for key in archive}


def imported(dataset: Path, *sources: Path, domain: str = "toy", **metadata):
    return import_episodes(dataset, sources, domain=domain, metadata=metadata, progress=False)


def require_whole(dataset: Path, episodes: int) -> None:
    for report in verify(dataset):
        assert report.problems == []
        assert report.episodes == episodes


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    return filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])
