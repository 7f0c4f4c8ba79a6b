"""Environments for tests, importable from any process: their frames say what they are of."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

SIZE = 6


class ToyEnv(gymnasium.Env):
    """frame = (domain, seed, step) in its first bytes; 3 to 15 steps; even seeds terminate."""

    def __init__(self, domain: str, image_size: int = SIZE, delay: float = 0.0) -> None:
        self.domain = domain
        self.image_size = image_size
        self.delay = delay
        self.observation_space = Box(0, 255, (3, image_size, image_size), np.uint8)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_, self.step_ = seed, 0
        return self._frame(), self._info(1.0)

    def step(self, action):
        time.sleep(self.delay)
        self.step_ += 1
        last = self.step_ == 3 + self.seed_ % 13
        terminated = last and self.seed_ % 2 == 0
        info = self._info(0.0 if terminated else 1.0)
        return self._frame(), float(action.sum()), terminated, last and not terminated, info

    def _frame(self) -> np.ndarray:
        identity = np.array([zlib.crc32(self.domain.encode()), self.seed_, self.step_], "<u4")
        frame = np.zeros((3, self.image_size, self.image_size), np.uint8)
        frame.reshape(-1)[:12] = identity.view(np.uint8)
        return frame

    def _info(self, discount: float) -> dict[str, Any]:
        return {"discount": discount, "state": np.array([self.seed_, self.step_], np.float64)}


def identity(frame: np.ndarray) -> tuple[int, int, int]:
    """(crc32 of the domain, seed, step) of a toy frame."""
    return tuple(int(x) for x in np.ascontiguousarray(frame).reshape(-1)[:12].view("<u4"))


def make(domain: str, *, render: str, action_repeat: int, image_size: int) -> gymnasium.Env:
    """A toy by name: `slow*` takes 2 ms a step, the others as fast as they can."""
    return ToyEnv(domain, image_size, 0.002 if domain.startswith("slow") else 0.0)


class _FailsInStep(ToyEnv):
    def step(self, action):
        raise KeyError("the arm fell off")


def make_failing(domain: str, **settings: Any) -> gymnasium.Env:
    """The domain `broken` raises in its first step."""
    return _FailsInStep(domain) if domain == "broken" else make(domain, **settings)


class _Reuses(ToyEnv):
    """Draws every frame into the same array, and keeps its state in another."""

    def _frame(self):
        if not hasattr(self, "canvas"):
            self.canvas = np.zeros((3, self.image_size, self.image_size), np.uint8)
        self.canvas[:] = super()._frame()
        return self.canvas

    def _info(self, discount):
        info = super()._info(discount)
        if not hasattr(self, "state"):
            self.state = np.zeros(2)
        self.state[:] = info["state"]
        return {**info, "state": self.state}


def make_reusing(domain: str, **settings: Any) -> gymnasium.Env:
    return _Reuses(domain)


MEETING = "CRPT_TEST_MEETING"
"""Names the directory where processes meet."""


class _Meets(ToyEnv):
    """Its first step waits for that of another process."""

    met = False

    def step(self, action):
        if not self.met:
            place = Path(os.environ[MEETING])
            (place / str(os.getpid())).touch()
            deadline = time.monotonic() + 120
            while len(list(place.iterdir())) < 2:
                if time.monotonic() > deadline:
                    raise TimeoutError("no other process has come")
                time.sleep(0.01)
            self.met = True
        return super().step(action)


def make_meeting(domain: str, **settings: Any) -> gymnasium.Env:
    return _Meets(domain)


class _Stuck(ToyEnv):
    """Its first step never returns, nor lets any other thread of its process run."""

    def step(self, action):
        # PyDLL keeps the interpreter's lock.
        return ctypes.PyDLL(None).pause()


def make_stuck(domain: str, **settings: Any) -> gymnasium.Env:
    """`hangs*` gets stuck as a driver does."""
    return _Stuck(domain) if domain.startswith("hangs") else make(domain, **settings)


def make_dying_when_written(domain: str, **settings: Any) -> gymnasium.Env:
    """The process dies after an episode was written, before it can say so; once."""
    from crpt.collect.random_play import EpisodeWriter

    close = EpisodeWriter.close

    def close_and_die(writer):
        close(writer)
        mark = Path(os.environ["TOY_MARK"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    EpisodeWriter.close = close_and_die
    return make(domain, **settings)


def make_on_a_full_disk(domain: str, **settings: Any) -> gymnasium.Env:
    """In this process, no file can grow beyond 120,000 bytes."""

    def allocate(descriptor, offset, length):
        if offset + length > 120_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.ftruncate(descriptor, offset + length)

    os.posix_fallocate = allocate
    return make(domain, **settings)


class _FailsLater(ToyEnv):
    def reset(self, *, seed=None, options=None):
        from crpt.collect.random_play import episode_seed

        first = episode_seed(5, self.domain, 0).spawn(1)[0].generate_state(1)[0]
        if seed != first:
            raise KeyError("the arm fell off")
        return super().reset(seed=seed)


def make_failing_later(domain: str, **settings: Any) -> gymnasium.Env:
    """Only the first episode of seed 5 can be played."""
    return _FailsLater(domain, delay=0.05)


class _EndsOnce(ToyEnv):
    """Ends or hangs its process: once (the file named by TOY_MARK says it did), often or always."""

    steps = 0

    def step(self, action):
        self.steps += 1
        mark = Path(os.environ["TOY_MARK"])
        due = self.steps == 20 and (self.domain.endswith("often") or not mark.exists())
        if due or self.domain.endswith("always"):
            mark.touch()
            if self.domain.startswith("hangs"):
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def make_ending(domain: str, **settings: Any) -> gymnasium.Env:
    """`dies_once`, `hangs_once`: in the 20th step. `*_often`: of every process. `*_always`: 1st."""
    if domain.startswith(("dies", "hangs")):
        # Slow enough for the first episodes to be written before the process ends.
        return _EndsOnce(domain, delay=0.01)
    return make(domain, **settings)


def make_where_torch_is_not(domain: str, **settings: Any) -> gymnasium.Env:
    if "torch" in sys.modules:
        raise AssertionError("a process that only records waited for torch")
    return make(domain, **settings)


def make_without_gl(domain: str, **settings: Any) -> gymnasium.Env:
    from crpt.envs import egl, rendering

    egl.load_library = rendering.load_library = lambda *names: None
    os.environ.pop("MUJOCO_GL", None)
    os.environ.pop("PYOPENGL_PLATFORM", None)
    rendering.select_backend()
    raise AssertionError("select_backend() should have raised")
