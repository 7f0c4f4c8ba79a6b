"""Storage of what was played: rings of steps, in memory or in a dataset directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crpt.replay.buffer import ReplayBuffer
from crpt.replay.errors import (
    DatasetCorruptError,
    DatasetError,
    DatasetFullError,
    DatasetLockedError,
    DatasetVersionError,
    NotEnoughMemoryError,
    OverwrittenError,
    require_disk_space,
)
from crpt.replay.spec import DomainSpec
from crpt.replay.together import open_together
from crpt.replay.writer import Writer

if TYPE_CHECKING:
    from crpt.replay.batch import Batch
    from crpt.replay.prefetch import Batches
    from crpt.replay.resident import ResidentCopy

__all__ = [
    "Batch",
    "Batches",
    "DatasetCorruptError",
    "DatasetError",
    "DatasetFullError",
    "DatasetLockedError",
    "DatasetVersionError",
    "DomainSpec",
    "NotEnoughMemoryError",
    "OverwrittenError",
    "ReplayBuffer",
    "ResidentCopy",
    "Writer",
    "open_together",
    "require_disk_space",
]

_WITH_TORCH = {"Batch": "batch", "Batches": "prefetch", "ResidentCopy": "resident"}


def __getattr__(name: str) -> Any:
    # A process that only writes does not wait for torch.
    if name in _WITH_TORCH:
        from importlib import import_module

        return getattr(import_module(f"crpt.replay.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'crpt.replay' has no attribute {name!r}")
