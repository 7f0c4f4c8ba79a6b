"""What drawing can come to; imported by processes of the doctor's, without torch as its own."""

from __future__ import annotations

import os
import sys
import time

from crpt.doctor.finding import Finding
from crpt.envs.rendering import RenderingUnavailableError


def drawn() -> Finding:
    return Finding("ok", "rendering by a toy")


def drawn_without_torch() -> Finding:
    return Finding("note" if "torch" in sys.modules else "ok", "drawn")


def not_drawn() -> Finding:
    raise RenderingUnavailableError("no OpenGL to render with; apt-get install it")


def not_installed() -> Finding:
    raise ModuleNotFoundError("No module named 'mujoco'")


def aborted() -> Finding:
    os.abort()


def hanging() -> Finding:
    time.sleep(600)
    raise AssertionError
