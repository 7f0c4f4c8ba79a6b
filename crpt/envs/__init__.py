"""Environments whose observations are frames, rendered without a display."""

from crpt.envs.dm_control_env import DMControlEnv
from crpt.envs.rendering import (
    IncompatibleVersionsError,
    RenderingUnavailableError,
    check_versions,
    select_backend,
)
from crpt.envs.suite import make
from crpt.envs.wrappers import FrameStack

__all__ = [
    "DMControlEnv",
    "FrameStack",
    "IncompatibleVersionsError",
    "RenderingUnavailableError",
    "check_versions",
    "make",
    "select_backend",
]
