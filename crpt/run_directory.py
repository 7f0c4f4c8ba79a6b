"""The run directory: what a run was asked to do, what it measured, and where it stopped.

    config.json  metrics.jsonl  speed.jsonl  encoder/  checkpoints/

Every stage opens it with its own config. The first time the config is written down; after that it
must be the same, so that a run that goes on is the run that was begun.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from crpt.files import append_text, replace_file

STAGE_LEAVES = {
    "collect": "dataset/*/cursor",
    "pretrain": "checkpoints/pretrain*.pt",
    "probe": "probe.json",
    "finetune": "checkpoints/finetune.pt",
    "evaluate": "evaluation.json",
}
"""The file by which a stage's config section (and its input's) becomes binding."""

_INPUT = "_input"
"""Ends the name of the section of what a stage was given."""

_BEFORE_RECORDING = {".lock", "config.json", "encoder", "checkpoints"}
"""What a stage may make before it leaves what makes it binding."""


class ConfigMismatchError(ValueError):
    """A run directory was opened with another config or input than it was begun with."""


class RunFileError(ValueError):
    """A file of the run directory that is not what crpt wrote."""


class RunDirectoryBusyError(RuntimeError):
    """Another process works in the run directory."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read."""


class RunDirectory:
    """One run's files. Paths are made when first written to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.speed_file = self.path / "speed.jsonl"
        self.encoder_dir = self.path / "encoder"
        self.checkpoint_dir = self.path / "checkpoints"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the directory for this process; the lock goes with the process, however it ends.

        What fails before it has recorded anything leaves no directory behind.
        """
        bare = not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        with self._lock():
            try:
                yield
            except BaseException:
                if bare:
                    self._remove_unless_recorded(missing)
                raise

    @contextmanager
    def _lock(self) -> Iterator[None]:
        while True:
            with self._lock_file() as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise RunDirectoryBusyError(
                        f"another process is running in {self.path}; wait for it, or choose "
                        "another --run-dir"
                    ) from error
                if os.fstat(lock.fileno()).st_nlink == 0:
                    continue  # who held it has removed it: no lock for those who come next
                yield
                return

    def _lock_file(self) -> TextIO:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            return (self.path / ".lock").open("w")
        except OSError as error:
            raise RunFileError(
                f"run_dir should be a directory to write to, got {self.path}: {error.strerror}"
            ) from error

    def _remove_unless_recorded(self, made: list[Path]) -> None:
        """made: the directory and those above it that were not there before, innermost first."""
        found = {path.name for path in self.path.iterdir()}
        if found - _BEFORE_RECORDING or any(map(self._binding, STAGE_LEAVES)):
            return
        for name in found - {".lock"}:
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.path / ".lock").unlink()
        for path in made:
            try:
                path.rmdir()
            except OSError:  # somebody else has put something there
                return

    def read_config(self) -> dict[str, Any]:
        if not self.config_file.exists():
            return {}
        try:
            config: dict[str, Any] = json.loads(self.config_file.read_text())
        except ValueError as error:
            raise ConfigMismatchError(
                f"{self.config_file} is not readable JSON ({error}); choose another --run-dir"
            ) from error
        if not isinstance(config, dict):
            raise ConfigMismatchError(
                f"{self.config_file} should be an object of sections, got {config!r}; choose "
                "another --run-dir"
            )
        return config

    def check(self, sections: dict[str, Any]) -> None:
        """Compare `sections` (name -> dataclass or value) with those of stages that left something.

        Raises ConfigMismatchError with every field that differs. Fields marked
        `metadata={"resumable": True}` may change between runs: they say how, not what. Those marked
        `{"grows_until": stage}` may become larger, or get more items, until that stage has left
        something. `{"absent": value}` is what runs did that were begun before there was such a
        field. A stage whose first attempt failed and left nothing binds nobody.
        """
        self.compare({k: v for k, v in self.read_config().items() if self._binding(k)}, sections)

    def compare(self, present: dict[str, Any], sections: dict[str, Any]) -> None:
        """`check`, against sections as `plain` left them instead of those of config.json."""
        wanted = plain(sections)
        marks = _marks(sections)
        differing = {
            name: f"  {name}: {was!r} -> {now!r}"
            for name, (was, now) in sorted(_differences(present, wanted).items())
            if not self._may_change(marks.get(name, {}), was, now)
        }
        if differing:
            inputs_alone = all(name.partition(".")[0].endswith(_INPUT) for name in differing)
            what = "dataset" if inputs_alone else "config"
            raise ConfigMismatchError(
                f"{self.path} was begun with another {what}; these fields differ "
                "(there -> asked for):\n" + "\n".join(differing.values()) + f"\nAsk for the same "
                f"{what} to go on, choose another --run-dir, or delete this one."
            )

    def claim(self, sections: dict[str, Any]) -> None:
        """`check`, then write the sections down: they are what the run is from now on."""
        self.check(sections)
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.read_config() | plain(sections)
        text = json.dumps(config, indent=2) + "\n"
        replace_file(self.config_file, lambda path: path.write_text(text))

    def _may_change(self, marks: Mapping[str, Any], was: Any, now: Any) -> bool:
        if was is None and "absent" in marks:
            return bool(now == marks["absent"])
        if "grows_until" in marks:
            return _has_grown(was, now) and not self._binding(marks["grows_until"])
        return bool(marks.get("resumable"))

    def _binding(self, section: str) -> bool:
        """Whether what this section describes has left something."""
        stage = section.removesuffix(_INPUT)
        if stage in STAGE_LEAVES:
            return any(self.path.glob(STAGE_LEAVES[stage]))
        return any(self._binding(stage) for stage in STAGE_LEAVES)

    def log(self, stage: str, step: int, **values: float | int | str | None) -> None:
        """Append one line to metrics.jsonl."""
        self._append(self.metrics_file, {"stage": stage, "step": step} | values)

    def log_speed(self, stage: str, step: int, **values: float | str) -> None:
        """Append one line to speed.jsonl: what the machine decides on, and not the seed."""
        self._append(self.speed_file, {"stage": stage, "step": step} | values)

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl, of one stage or of all."""
        return [line for line in _lines(self.metrics_file) if stage in (None, line["stage"])]

    def rewind_logs(self, stage: str, step: int) -> None:
        """Forget the stage's lines after `step`: they are about to be measured again."""
        for file in (self.metrics_file, self.speed_file):
            if file.exists():
                lines = _lines(file)
                kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
                text = "".join(json.dumps(line) + "\n" for line in kept)
                replace_file(file, partial(_write_text, text=text))

    def _append(self, file: Path, line: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        append_text(file, json.dumps(line) + "\n")

    def save_checkpoint(
        self, name: str, state: dict[str, Any], *, step: int = 0, keep: int = 1
    ) -> None:
        """Write checkpoints/NAME.pt in one step: tensors and plain values only.

        With keep > 1 it and the keep - 1 before it stay there too, as NAME-STEP.pt.
        """
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        newest = self.checkpoint_dir / f"{name}.pt"
        replace_file(newest, lambda path: torch.save(state, path))
        if keep > 1:
            # Another name of the same file: it takes no room of its own.
            replace_file(self.checkpoint_dir / f"{name}-{step:09d}.pt", partial(_link, newest))
        newest_first = self._older_checkpoints(name)[::-1]
        for path in newest_first[keep if keep > 1 else 0 :]:
            path.unlink()

    def has_checkpoint(self, name: str) -> bool:
        """Whether `load_checkpoint` has something to load."""
        return (self.checkpoint_dir / f"{name}.pt").exists() or bool(self._older_checkpoints(name))

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """The state last saved under this name; where NAME.pt is gone, the newest of those kept;
        or None."""
        path = self.checkpoint_dir / f"{name}.pt"
        older = self._older_checkpoints(name)
        if not path.exists():
            if not older:
                return None
            path = older[-1]
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen types for a damaged file
            raise CheckpointError(
                f"{path} cannot be read ({error}); delete it to "
                + ("go on from the one before it" if older[:-1] else "begin the stage again")
            ) from error
        return state

    def _older_checkpoints(self, name: str) -> list[Path]:
        """Those kept under their steps, oldest first."""
        return sorted(self.checkpoint_dir.glob(f"{name}-{'[0-9]' * 9}.pt"))

    def write_json(self, name: str, value: Any) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value, indent=2) + "\n"
        replace_file(self.path / name, lambda path: path.write_text(text))

    def read_json(self, name: str) -> Any:
        """The content of NAME, or None where it is not there yet."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise RunFileError(
                f"{path} is not readable JSON ({error}); delete it to measure again"
            ) from error


def dataset_in(path: Path) -> Path:
    """The dataset of a run directory; any other path as it is."""
    own = path / "dataset"
    return own if (own / "dataset.json").exists() and not (path / "dataset.json").exists() else path


def _lines(file: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; none where there is no such file."""
    lines: list[dict[str, Any]] = []
    for text in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a line cut short by a kill
        if not (isinstance(line, dict) and {"stage", "step"} <= line.keys()):
            raise RunFileError(
                f"{file} should have a stage and a step in every line, got {text[:80]!r}"
            )
        lines.append(line)
    return lines


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _link(file: Path, path: Path) -> None:
    try:
        os.link(file, path)
    except OSError:  # a file system without them
        shutil.copyfile(file, path)


def plain(sections: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of them: dicts, lists (also for tuples), strings and numbers."""
    return {name: _plain(section) for name, section in sections.items()}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))


def _differences(present: Any, wanted: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields that both have, or that one lacks in a section of both, with their two values.

    An input is made of sections: what earlier releases did not note of it cannot be compared.
    """
    if not (isinstance(present, dict) and isinstance(wanted, dict)):
        return {} if present == wanted else {prefix: (present, wanted)}
    of_sections = not prefix or prefix.endswith(_INPUT)
    names = present.keys() & wanted.keys() if of_sections else present.keys() | wanted.keys()
    found: dict[str, tuple[Any, Any]] = {}
    for name in names:
        inner = f"{prefix}.{name}" if prefix else name
        found |= _differences(present.get(name), wanted.get(name), inner)
    return found


def _marks(sections: dict[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the fields of the sections are marked with, by section.field."""
    return {
        f"{name}.{f.name}": f.metadata
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
        for f in dataclasses.fields(section)
    }


def _has_grown(was: Any, now: Any) -> bool:
    if isinstance(was, list) and isinstance(now, list):
        return set(was) <= set(now)
    return bool(was is not None and now is not None and now >= was)
