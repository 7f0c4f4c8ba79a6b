"""Storage of what was played: rings of steps, in memory or in a dataset directory."""

from crpt.replay.buffer import Batch, ReplayBuffer
from crpt.replay.errors import (
    DatasetCorruptError,
    DatasetError,
    DatasetFullError,
    DatasetLockedError,
    DatasetVersionError,
    require_disk_space,
)
from crpt.replay.store import DomainSpec
from crpt.replay.writer import Writer

__all__ = [
    "Batch",
    "DatasetCorruptError",
    "DatasetError",
    "DatasetFullError",
    "DatasetLockedError",
    "DatasetVersionError",
    "DomainSpec",
    "ReplayBuffer",
    "Writer",
    "require_disk_space",
]
