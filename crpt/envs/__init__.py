"""Environments whose observations are frames, rendered without a display."""

from crpt.envs.dm_control_env import DMControlEnv
from crpt.envs.rendering import (
    IncompatibleVersionsError,
    RenderingUnavailableError,
    check_versions,
    select_backend,
)
from crpt.envs.suite import known_names, make, require_known
from crpt.envs.wrappers import FrameStack

__all__ = [
    "DMControlEnv",
    "FrameStack",
    "IncompatibleVersionsError",
    "RenderingUnavailableError",
    "check_versions",
    "known_names",
    "make",
    "require_known",
    "select_backend",
]
