"""How much memory there is before something large is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crpt.replay.errors import NotEnoughMemoryError, megabytes

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def require_memory(nbytes: int, what: str = "the buffer") -> None:
    """Raises NotEnoughMemoryError if fewer than `nbytes` bytes of memory are available."""
    available = available_memory()
    if nbytes > available:
        raise NotEnoughMemoryError(
            f"{what} needs {megabytes(nbytes)} of memory, but {megabytes(available)} are "
            "available; ask for less capacity, or create it in files: they may be larger than "
            "memory"
        )


def available_memory() -> int:
    """Bytes that this process can allocate without pushing out others: of the machine and of every
    control group it is in."""
    for line in (_PROC / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min([int(line.split()[1]) * 1024, *_left_in_groups()])
    raise RuntimeError(f"{_PROC}/meminfo should have a line MemAvailable, got none")


def _left_in_groups() -> Iterator[int]:
    for line in (_PROC / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache = _CGROUPS / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most = (folder / limit).read_text().strip()
                if most == "max":
                    continue
                used = int((folder / usage).read_text())
                stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # the root group has no limit; another's may be hidden from us
                continue
            # Clean pages of files count as used, and go first.
            yield max(0, int(most) - used + int(stat.get(cache, 0)))
