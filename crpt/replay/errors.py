"""What can be wrong with a dataset on disk. Every message names the file and the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

REMEDY = "restore it from a copy, or remove the dataset and collect it again"


class DatasetError(RuntimeError):
    """A dataset cannot be used as asked; nothing on disk was changed."""


class DatasetVersionError(DatasetError):
    """The dataset was written in a format that this version does not read."""


class DatasetCorruptError(DatasetError):
    """A file of the dataset is missing, cut short or not what its header says."""


class DatasetLockedError(DatasetError):
    """Another writer, in this process or another, has the domain open."""


class DatasetFullError(DatasetError):
    """No room for the next steps, on the disk or in memory; those already committed are whole."""


class NotEnoughMemoryError(DatasetError, MemoryError):
    """What was asked for would not fit into the memory that is available; nothing was allocated."""


class OverwrittenError(DatasetError):
    """Writers overwrite steps faster than they can be read: the ring is too small for them."""


def require_disk_space(path: Path, nbytes: int) -> None:
    """Raises DatasetFullError if the file system of `path` has fewer than `nbytes` bytes free."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise DatasetFullError(
            f"{path} needs {megabytes(nbytes)} of disk, but {megabytes(free)} are free; "
            "make room, or choose another directory"
        )


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
