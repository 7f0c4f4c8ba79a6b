"""Directories that come to be whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def draft_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, to be renamed to it once it is whole; gone at the end if it
    was not.

    Its process holds a lock on it, so that what a killed one left, a whole ring perhaps, goes with
    the next.
    """
    path = path.absolute()
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.draft"):
        _remove_if_left(left)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.mkdir()
    descriptor = os.open(draft, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then it stays
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield draft
    finally:
        os.close(descriptor)
        shutil.rmtree(draft, ignore_errors=True)


def _remove_if_left(draft: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft, ignore_errors=True)
        finally:
            os.close(descriptor)
