"""dataset.json: what a dataset directory holds, and how it comes to be, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crpt.replay.drafts import draft_directory
from crpt.replay.errors import (
    DatasetCorruptError,
    DatasetError,
    DatasetVersionError,
    require_disk_space,
)
from crpt.replay.locks import lock
from crpt.replay.places import create_directory
from crpt.replay.spec import DomainSpec

FORMAT_VERSION = 2
_FILE = "dataset.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]*")


def directory(path: Path, domain: str) -> Path:
    """Where a domain's files are: a Gymnasium id may have a `/` and a `:`, a directory may not."""
    return path / urllib.parse.quote(domain, safe="")


def check_names(domains: Iterable[str]) -> None:
    """Raises ValueError for a name that is neither a dm_control task's nor a Gymnasium id's."""
    for name in domains:
        if not isinstance(name, str):
            raise TypeError(f"domain should be a str, got {type(name).__name__}")
        if not _NAME.fullmatch(name) or name == _FILE:
            raise ValueError(
                f"domain should be letters, digits, '_', '-', '.', ':' and '/', got {name!r}"
            )


def create(path: Path, domains: Mapping[str, DomainSpec], metadata: Mapping[str, Any]) -> None:
    """Makes the directory under another name and renames it: nobody ever sees half of it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists; open it, or choose another directory")
    require_disk_space(path, sum(s.capacity * s.bytes_per_step() for s in domains.values()))
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path.absolute().parent} should be a directory") from None
    with draft_directory(path) as draft:
        for name, spec in domains.items():
            create_directory(directory(draft, name), spec)
        _write(draft, domains, metadata)
        draft.rename(path)


def add_domain(path: Path, domain: str, spec: DomainSpec) -> None:
    """Adds the files of a domain, then its entry, under a lock on the directory."""
    with _locked(path):
        domains, metadata = read(path)
        if domain in domains:
            raise ValueError(f"domain should be a new one, got {domain}")
        require_disk_space(path, spec.capacity * spec.bytes_per_step())
        # What lies there without an entry is the rest of an attempt that was killed.
        shutil.rmtree(directory(path, domain), ignore_errors=True)
        create_directory(directory(path, domain), spec)
        _write(path, {**domains, domain: spec}, metadata)


def read(path: Path) -> tuple[dict[str, DomainSpec], dict[str, Any]]:
    """The domains and the metadata of a dataset directory."""
    file = path / _FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
        if not isinstance(version, int):
            raise TypeError(f"format_version should be an int, got {version!r}")
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetCorruptError(f"{path} is not a dataset: it has no {_FILE}") from None
    except OSError as error:
        raise DatasetError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetCorruptError(
            f"{file} cannot be read ({error}); restore it, or collect the dataset again"
        ) from None
    if version > FORMAT_VERSION:
        raise DatasetVersionError(
            f"{path} has format version {version}, this crpt reads {FORMAT_VERSION}: upgrade crpt"
        )
    if version < FORMAT_VERSION:
        raise DatasetVersionError(
            f"{path} has format version {version}, this crpt reads {FORMAT_VERSION}: "
            "collect it again, or use the crpt that wrote it"
        )
    try:
        domains = {name: DomainSpec(**spec) for name, spec in content["domains"].items()}
        check_names(domains)
        return domains, dict(content["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetCorruptError(
            f"{file} cannot be read ({error}); restore it, or collect the dataset again"
        ) from None


def _write(path: Path, domains: Mapping[str, DomainSpec], metadata: Mapping[str, Any]) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        # Sorted, because processes that collect side by side add theirs in any order.
        "domains": {name: dataclasses.asdict(domains[name]) for name in sorted(domains)},
        "metadata": dict(metadata),
    }
    draft = path / f".{_FILE}"
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(path / _FILE)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lock(descriptor, fcntl.LOCK_EX, str(path))
        yield
    finally:
        os.close(descriptor)
