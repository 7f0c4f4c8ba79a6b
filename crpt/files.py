"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

Write = Callable[[Path], object]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with where the disk, or what this user may take of it, is used up."""
# Less room than this, after a write that failed, is why it failed.
_PROBE_BYTES = 1 << 16


class DiskFullError(OSError):
    """No room for a file; what it held before is still there."""


def replace_file(path: Path, write: Write) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    A reader, also after a kill or a power cut at any moment, sees the old content or the new one,
    never a part. One writer at a time: the temporary file's name is fixed, so that what a kill
    leaves of it goes with the next write. Raises DiskFullError, with the old content kept.
    """
    with _draft(path, write) as draft:
        os.replace(draft, path)
        _sync(path.parent)


def replace_files(writes: dict[Path, Write]) -> None:
    """Replace files of one directory that belong together; the last one is the sign of all.

    All are filled before any is replaced, so a full disk leaves the old ones. Then the sign is
    removed, the others are put in place, and the sign last: after a kill at any moment, who finds
    the sign finds files of one write.
    """
    *others, sign = writes
    with ExitStack() as stack:
        drafts = {path: stack.enter_context(_draft(path, write)) for path, write in writes.items()}
        sign.unlink(missing_ok=True)
        _sync(sign.parent)
        for path in others:
            os.replace(drafts[path], path)
        _sync(sign.parent)
        os.replace(drafts[sign], sign)
        _sync(sign.parent)


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file; raises DiskFullError, perhaps with a part of the text there."""
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise _disk_full(error.errno, path) from error


@contextmanager
def _draft(path: Path, write: Write) -> Iterator[Path]:
    """A filled temporary file beside `path`, gone at the end unless it was put in place."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)
    try:
        try:
            write(draft)
            _sync(draft)
        except Exception as error:
            reason = _no_room(error, draft)
            if reason is None:
                raise
            raise _disk_full(reason, path) from error
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _disk_full(reason: int, path: Path) -> DiskFullError:
    free = shutil.disk_usage(path.parent).free
    return DiskFullError(
        reason,
        f"{os.strerror(reason)}: {path} could not be written ({free / 1e6:,.1f} MB free); "
        "what it held before is kept: make room and run the same command again",
    )


def _no_room(error: Exception, draft: Path) -> int | None:
    """One of NO_ROOM where that is why the draft could not be written."""
    if isinstance(error, OSError):
        return error.errno if error.errno in NO_ROOM else None
    # torch and safetensors raise errors of their own, without the reason: ask the disk.
    try:
        with draft.open("ab") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as full:
        return full.errno if full.errno in NO_ROOM else None
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
