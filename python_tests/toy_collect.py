"""Collections of toys, for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import toy_env

from crpt.collect import collect
from crpt.config import CollectConfig

CONFIG = CollectConfig(
    domains=("fast_a", "fast_b"), transitions=100, image_size=toy_env.SIZE, workers=1
)


def toy_collect(path: Path, make_env=toy_env.make, progress=False, seed=5, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return collect(config, path, seed=seed, make_env=make_env, progress=progress)


def contents(path: Path) -> dict[str, bytes]:
    """All there is but the count of roll-backs, which is not data: a resumed domain has more."""
    files = (p for p in path.rglob("*") if p.is_file() and p.name != "epoch")
    return {str(p.relative_to(path)): p.read_bytes() for p in files}
