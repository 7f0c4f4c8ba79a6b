"""Several datasets as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from crpt.replay.buffer import ReplayBuffer
from crpt.replay.store import Store

_AGREED = ("render", "action_repeat")

_log = logging.getLogger(__name__)


def open_together(paths: Sequence[str | Path]) -> ReplayBuffer:
    """One buffer of all domains of several dataset directories.

    A domain of the same name as one in an earlier directory is NAME#2, NAME#3, ...: a ring of its
    own. Metadata are those in which all agree, and `seeds`, that of each. Of rendering and action
    repeat nothing is known where one does not tell; a warning names it.

    Raises:
        ValueError: none are named, one is named twice, or they were rendered or played otherwise.
        DatasetVersionError, DatasetCorruptError: as of `ReplayBuffer.open`.
    """
    places = [Path(path).resolve() for path in paths]
    if not places or len(set(places)) < len(places):
        raise ValueError(
            f"datasets should be different directories, at least one, got {list(map(str, paths))}"
        )
    buffers = [ReplayBuffer.open(path) for path in places]
    for key in _AGREED:
        found = {str(b.path): b.metadata[key] for b in buffers if b.metadata.get(key) is not None}
        if len(set(found.values())) > 1:
            got = ", ".join(f"{path} {value}" for path, value in found.items())
            raise ValueError(f"{key} of all datasets should be one, got {got}")
    if len(buffers) == 1:
        return buffers[0]
    stores: dict[str, Store] = {}
    for buffer in buffers:
        for domain in buffer.domains:
            stores[_free(domain, stores)] = buffer._store(domain)
    first = buffers[0].metadata.items()
    agreed = {k: v for k, v in first if all(b.metadata.get(k) == v for b in buffers[1:])}
    for key in _AGREED:
        silent = [str(b.path) for b in buffers if b.metadata.get(key) is None]
        if 0 < len(silent) < len(buffers):
            _log.warning(
                "%s of the datasets together is unknown, for %s does not tell it", key,
                ", ".join(silent),
            )  # fmt: skip
    agreed["seeds"] = [buffer.metadata.get("seed") for buffer in buffers]
    return ReplayBuffer(None, stores, agreed)


def name_of(domain: str) -> str:
    """The domain's name without the number that `open_together` may have given it."""
    return domain.partition("#")[0]


def _free(domain: str, taken: dict[str, Store]) -> str:
    name, number = domain, 1
    while name in taken:
        number += 1
        name = f"{domain}#{number}"
    return name
