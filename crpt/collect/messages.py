"""What the parent of a collection and its processes say to each other. Frames are not among it."""

from __future__ import annotations

from typing import NamedTuple

from crpt.collect.schedule import Episode

# What the parent says.


class Play(NamedTuple):
    """Play this episode next."""

    episode: Episode


class Turn(NamedTuple):
    """Write this episode: its domain ends before it, and has room for so many transitions."""

    episode: Episode
    room: int


class Drop(NamedTuple):
    """Forget this episode."""

    episode: Episode


# What the process says.


class Begun(NamedTuple):
    """The environment is there, and the episode's first frame."""

    episode: Episode


class Steps(NamedTuple):
    """So many transitions were played of the episode; seconds a step, on average and at most."""

    episode: Episode
    length: int
    seconds_per_step: float
    slowest: float


class Full(NamedTuple):
    """The memory for what cannot be written yet is full; the process waits for a turn."""

    episode: Episode


class Played(NamedTuple):
    """The episode was played to its end, and waits for its turn; the process wants another."""

    episode: Episode
    length: int


class Written(NamedTuple):
    """The episode is on disk."""

    episode: Episode
    length: int


class Failed(NamedTuple):
    """The environment or the disk failed in this episode."""

    episode: Episode
    error: Exception
