"""`python -m crpt.dataset info`: what a dataset holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crpt.bench.table import Column, Table
from crpt.replay import ReplayBuffer
from crpt.replay.errors import megabytes
from crpt.replay.manifest import FORMAT_VERSION, directory

_DISK_BLOCK = 512  # the unit of st_blocks, whatever the file system


def describe(dataset: str | Path) -> dict[str, Any]:
    """The dataset's domains and metadata, as plain values."""
    dataset = Path(dataset)
    buffer = ReplayBuffer.open(dataset)
    return {
        "path": str(dataset),
        "format_version": FORMAT_VERSION,
        "metadata": buffer.metadata,
        "domains": {name: _domain(buffer, dataset, name) for name in buffer.domains},
    }


def _domain(buffer: ReplayBuffer, dataset: Path, name: str) -> dict[str, Any]:
    spec, arrays = buffer.spec(name), buffer.arrays(name)
    episodes = buffer.episodes(name, frame_stack=1)
    whole = [e for e in episodes if arrays["is_first"][e[0]] and arrays["is_last"][e[-1]]]
    returns = [float(arrays["rewards"][e].sum(dtype=np.float64)) for e in whole]
    files = [path for path in directory(dataset, name).iterdir() if path.is_file()]
    return {
        "transitions": buffer.num_transitions(name, frame_stack=1),
        "episodes": len(whole),
        "open_or_cut_episodes": len(episodes) - len(whole),
        "terminated_episodes": sum(float(arrays["discounts"][e[-1]]) == 0 for e in whole),
        "mean_return": float(np.mean(returns)) if returns else None,
        "frame_shape": list(spec.frame_shape),
        "action_shape": list(spec.action_shape),
        "state_shape": list(spec.state_shape),
        "camera": spec.camera,
        "capacity": buffer.capacity(name),
        "overwritten_steps": max(0, buffer.cursor(name) - buffer.capacity(name)),
        "bytes_on_disk": sum(path.stat().st_blocks * _DISK_BLOCK for path in files),
    }


def text(described: dict[str, Any]) -> str:
    """The same for a person."""
    domains = described["domains"]
    rows = [
        [
            name,
            f"{d['transitions']:,}",
            f"{d['episodes']:,}",
            "-" if d["mean_return"] is None else f"{d['mean_return']:.1f}",
            _shape(d["frame_shape"]),
            _shape(d["action_shape"]),
            _shape(d["state_shape"]),
            megabytes(d["bytes_on_disk"]),
        ]
        for name, d in domains.items()
    ]
    headings = (
        "domain", "transitions", "episodes", "mean return", "frame", "action", "state", "on disk"
    )  # fmt: skip
    columns = [
        Column(heading, max(len(cell) for cell in (heading, *column)), number=i > 0)
        for i, (heading, *column) in enumerate(zip(headings, *rows, strict=True))
    ]
    table = Table(columns)
    lines = [*table.header(), *map(table.line, rows), ""]
    total = sum(d["bytes_on_disk"] for d in domains.values())
    lines.append(
        f"{described['path']}: format version {described['format_version']}, {megabytes(total)}"
    )
    for name, d in domains.items():
        if d["overwritten_steps"]:
            lines.append(f"{name}: {d['overwritten_steps']:,} older steps were overwritten")
        if d["open_or_cut_episodes"]:
            lines.append(f"{name}: {d['open_or_cut_episodes']} episodes open, cut or overwritten")
        if d["camera"] is not None:
            lines.append(f"{name}: camera {d['camera']}")
    for name, value in described["metadata"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        lines.append(f"{name.replace('_', ' ')}: {value}")
    return "\n".join(lines)


def _shape(shape: list[int]) -> str:
    return "-" if shape == [0] else "×".join(map(str, shape)) or "()"
