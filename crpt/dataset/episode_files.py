"""Episodes as DrQ-v2, URLB and ExORL keep them: `{stamp}_{index}_{length}.npz`, rows 0 to `length`.

observation  uint8 [T + 1, K*3, H, W]   K stacked frames, oldest first; row 0: the first frame
action       [T + 1, A]                 row t led to observation t; row 0 says nothing
reward       [T + 1, 1]
discount     [T + 1, 1]                 0: terminated
physics      [T + 1, S]                 the simulator's state (ExORL); `state` is read as well
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crpt.replay import DatasetError, DomainSpec

CHANNELS = 3
STATES = ("physics", "state")
_NEEDED = ("observation", "action", "reward", "discount")
_NAME = re.compile(r"([^_]+)_(\d+)_(\d+)")
# All that reading a broken archive, or one that somebody made up, was seen to raise.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError,
    RuntimeError, MemoryError, KeyError, SyntaxError, OverflowError,
)  # fmt: skip


class EpisodeFileError(DatasetError):
    """A file of an episode cannot be used; the message names it."""


@dataclass(frozen=True)
class Episode:
    """One episode, frames once; row t is the step to frame t, row 0 that of the reset."""

    frames: NDArray[np.uint8]  # [T + 1, C, H, W]
    actions: NDArray[np.float32]  # [T + 1, *A]
    rewards: NDArray[np.float32]  # [T + 1]
    discounts: NDArray[np.float32]  # [T + 1]
    states: NDArray[np.float64]  # [T + 1, *S]
    lost: tuple[str, ...]
    """What of the file has no place in a dataset."""


@dataclass(frozen=True)
class _Array:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class EpisodeFile:
    """An archive whose headers have been read and checked, and its arrays not yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.transitions = length_of(path)
        arrays: dict[str, _Array] = {}
        self.checksums: dict[str, int] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    key = member.filename.removesuffix(".npy")
                    arrays[key] = _header(archive, member)
                    self.checksums[key] = member.CRC
        except _BROKEN as error:
            raise self._broken(error) from None
        self._arrays = arrays
        self.spec = self._spec()

    def read(self) -> Episode:
        """The arrays, each checked against the others."""
        observation, action, reward, discount = (self._load(key) for key in _NEEDED)
        frames = self._frames(observation)
        rewards = self._finite("reward", reward).reshape(len(frames))
        discounts = self._finite("discount", discount).reshape(len(frames))
        if discounts.min() < 0 or discounts.max() > 1:
            raise self._wrong("discounts", "in [0, 1]", f"{discounts.min()} to {discounts.max()}")
        states = np.zeros((len(frames), *self.spec.state_shape), np.float64)
        key = self._states_key()
        if key is not None:
            states = self._load(key).astype(np.float64)
        lost = [k for k in self._arrays if k not in (*_NEEDED, key)]
        placeholder = (np.any(action[0]), rewards[0] != 0, discounts[0] != 1)
        if any(placeholder):
            lost.append("row 0 of action, reward or discount")
        actions = self._finite("action", action)
        return Episode(frames, actions, rewards, discounts, states, tuple(lost))

    def require(self, spec: DomainSpec) -> None:
        """Raises EpisodeFileError unless its steps are like those of the domain."""
        for name in ("frame_shape", "action_shape", "state_shape"):
            mine, wanted = getattr(self.spec, name), getattr(spec, name)
            if mine != wanted:
                what = name.replace("_", " ")
                raise self._wrong(f"the {what}", f"{list(wanted)} as before", list(mine))

    def _spec(self) -> DomainSpec:
        """What its steps look like; capacity: those of this file."""
        missing = [key for key in _NEEDED if key not in self._arrays]
        if missing:
            have = ", ".join(self._arrays)
            raise self._wrong("keys", f"{', '.join(_NEEDED)} (and physics)", have or "none")
        rows = self.transitions + 1
        if self.transitions < 1:
            raise self._wrong("an episode", "at least one transition long", self.transitions)
        observation = self._arrays["observation"]
        if len(observation.shape) != 4 or observation.dtype != np.uint8:
            raise EpisodeFileError(
                f"{self.path}: observation should be pixels, uint8 [T + 1, K*{CHANNELS}, H, W], "
                f"got {observation.dtype} {list(observation.shape)}; episodes of states alone "
                "have no frames to learn from: record them with pixels"
            )
        channels, height, width = observation.shape[1:]
        if channels < CHANNELS or channels % CHANNELS or channels > width < height:
            raise self._wrong(
                "observation", f"[T + 1, K*{CHANNELS}, H, W], channels first",
                list(observation.shape),
            )  # fmt: skip
        for key, array in self._arrays.items():
            if key in (*_NEEDED, *STATES) and array.shape[:1] != (rows,):
                got = f"{key} of shape {list(array.shape)}"
                raise self._wrong("arrays", f"{rows} rows long, one more than its name says", got)
        for key in ("reward", "discount"):
            if prod(self._arrays[key].shape) != rows:
                raise self._wrong(key, [rows, 1], list(self._arrays[key].shape))
        for key in (*_NEEDED[1:], *STATES):
            if key in self._arrays and self._arrays[key].dtype.kind not in "fiub":
                raise self._wrong(key, "numbers", self._arrays[key].dtype)
        states = self._states_key()
        return DomainSpec(
            capacity=rows,
            action_shape=self._arrays["action"].shape[1:],
            state_shape=self._arrays[states].shape[1:] if states else (0,),
            frame_shape=(CHANNELS, height, width),
        )

    def _states_key(self) -> str | None:
        return next((key for key in STATES if key in self._arrays), None)

    def _frames(self, observation: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The newest frame of each stack, if the older ones are the newest of the rows before."""
        rows, channels, height, width = observation.shape
        stacks = observation.reshape(rows, channels // CHANNELS, CHANNELS, height, width)
        if (stacks[0] != stacks[0, -1]).any():
            raise self._wrong("observation 0", "the episode's first frame, repeated", "others")
        same = (stacks[1:, :-1] == stacks[:-1, 1:]).all(axis=(1, 2, 3, 4))
        if not same.all():
            row = int(np.argmin(same)) + 1
            wanted = f"the frames of observation {row - 1} and one more"
            raise self._wrong(f"observation {row}", wanted, "others")
        return np.ascontiguousarray(stacks[:, -1])

    def _finite(self, key: str, array: NDArray[Any]) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            numbers = array.astype(np.float32)
        bad = ~np.isfinite(numbers.reshape(len(numbers), -1)).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            raise self._wrong(f"{key} {row}", "finite float32 numbers", array[row].tolist())
        return numbers

    def _load(self, key: str) -> NDArray[Any]:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{key}.npy") as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                member.read()  # to the end, where the checksum is compared
                return array
        except _BROKEN as error:
            raise self._broken(error) from None

    def _wrong(self, what: str, wanted: object, got: object) -> EpisodeFileError:
        return EpisodeFileError(f"{self.path}: {what} should be {wanted}, got {got}")

    def _broken(self, error: BaseException) -> EpisodeFileError:
        reason = str(error) or type(error).__name__
        return EpisodeFileError(
            f"{self.path} cannot be read as an episode, it may be cut short ({reason}); "
            "remove it, or get it anew"
        )


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Array:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(
                f"{member.filename} holds pickled Python objects, which could run any code"
            )
        size = file.tell() + dtype.itemsize * prod(shape)
    if member.file_size != size:
        raise ValueError(f"{member.filename} should have {size} bytes, got {member.file_size}")
    return _Array(shape, dtype)


def length_of(path: Path) -> int:
    """Transitions of an episode, as its file's name says."""
    return int(_parts(path)[2])


def find(directories: Iterable[Path]) -> list[Path]:
    """The episodes of the directories, one directory after the other, in the order of recording."""
    files: list[Path] = []
    for directory in directories:
        if not directory.is_dir():
            raise NotADirectoryError(f"{directory} should be a directory of .npz episodes")
        found = sorted(directory.glob("*.npz"), key=_order)
        if not found:
            raise FileNotFoundError(
                f"{directory} should have episodes named STAMP_INDEX_LENGTH.npz, got none"
            )
        files += found
    return files


def _order(path: Path) -> tuple[str, int, str]:
    stamp, index, _ = _parts(path)
    return stamp, int(index), path.name


def _parts(path: Path) -> tuple[str, str, str]:
    match = _NAME.fullmatch(path.stem)
    if match is None:
        raise EpisodeFileError(
            f"{path} should be named STAMP_INDEX_LENGTH.npz, as the episodes of DrQ-v2, URLB and "
            "ExORL are"
        )
    return match[1], match[2], match[3]


def write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """The archive that DrQ-v2's own storage writes; the same bytes for the same arrays."""
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
