"""Locks on files, between the processes of one machine."""

from __future__ import annotations

import fcntl

from crpt.replay.errors import DatasetError


def lock(file: int, kind: int, label: str) -> bool:
    """flock; whether it is held now. False: another one holds it, and `kind` says not to wait."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise DatasetError(
            f"{label} cannot be locked ({error.strerror}), and without a lock two writers could "
            "destroy each other's steps: its file system has none, as some network file systems; "
            "move the dataset to another one"
        ) from error
    return True
