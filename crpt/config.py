"""Every number of the method as a field, one frozen dataclass per stage, and the presets.

The defaults are the preset `paper`: arXiv 2302.05614 to the letter. A preset is a set of small named
differences from them (`PRESETS`); nothing changes a config after it was built.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CollectConfig:
    """Reward-free random play: what is recorded, where and how."""

    domains: tuple[str, ...] = ("cheetah_run", "walker_run", "quadruped_run")
    """dm_control tasks by name; only their dynamics and looks are used, never their rewards."""
    transitions: int = 100_000
    """Transitions per domain, in agent steps."""
    episode_length: int | None = None
    """Agent steps per episode; none: the task's own time limit. Shorter episodes start more often from a random pose."""
    action_repeat: int = 2
    """Environment steps per agent step, with the same action."""
    image_size: int = 84
    """Height and width of a frame, in pixels."""
    render: Literal["exact", "fast"] = "exact"
    """exact: the pixels of dm_control. fast: no shadows and no multisampling, several times faster in software, other pixels."""
    workers: int = 0
    """Processes; 0: one per core, at most one per domain. The data does not depend on it."""
