"""Environments whose observations are frames, rendered without a display."""

from crpt.envs.dispatch import known_names, make, require_known
from crpt.envs.dm_control_env import DMControlEnv
from crpt.envs.gymnasium_env import GymnasiumEnv, warn_unless_repeatable
from crpt.envs.rendering import (
    IncompatibleVersionsError,
    RenderingUnavailableError,
    check_versions,
    select_backend,
)
from crpt.envs.wrappers import FrameStack

__all__ = [
    "DMControlEnv",
    "FrameStack",
    "GymnasiumEnv",
    "IncompatibleVersionsError",
    "RenderingUnavailableError",
    "check_versions",
    "known_names",
    "make",
    "require_known",
    "select_backend",
    "warn_unless_repeatable",
]
