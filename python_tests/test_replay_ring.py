"""The replay buffer against a plain list of episodes."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy_replay import SPEC, frame, ids

from crpt.replay import DomainSpec, ReplayBuffer


@dataclass
class Model:
    """The same ring, the slow way: all steps ever committed, and the oldest one still kept."""

    steps: list[tuple[int, bool]] = field(default_factory=list)  # identity, is_first
    sealed: int = 0
    floor: int = 0

    def commit(self, identity: int, first: bool, last: bool, capacity: int) -> None:
        self.steps.append((identity, first))
        self.floor = max(self.floor, len(self.steps) - capacity)
        if last:
            self.sealed = len(self.steps)

    def roll_back(self, step: int) -> None:
        del self.steps[step:]
        self.sealed = min(self.sealed, step)
        self.floor = min(self.floor, step)

    def stack(self, step: int) -> tuple[int, ...] | None:
        """Identities of the frames of the stack that ends in `step`; none if one is lost."""
        stack = [step]
        while len(stack) < 3:
            stack.insert(0, stack[0] if self.steps[stack[0]][1] else stack[0] - 1)
        return tuple(self.steps[s][0] for s in stack) if min(stack) >= self.floor else None

    def transitions(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        pairs = [
            (self.stack(step - 1), self.stack(step))
            for step in range(self.floor + 1, len(self.steps))
            if not self.steps[step][1]
        ]
        return [pair for pair in pairs if None not in pair]


class RingMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 12), in_files=st.booleans())
    def create(self, capacity: int, in_files: bool) -> None:
        self.directory = tempfile.mkdtemp() if in_files else None
        self.path = Path(self.directory) / "data" if self.directory else None
        self.capacity = capacity
        spec = DomainSpec(
            capacity=capacity, action_shape=(2,), state_shape=(1,), frame_shape=SPEC.frame_shape
        )
        self.buffer = ReplayBuffer.create(self.path, {"toy": spec})
        self.writer = self.buffer.writer("toy")
        self.model = Model()
        self.next = 0
        self.open = False

    def _identity(self) -> int:
        self.next = self.next % 255 + 1
        return self.next

    @precondition(lambda self: not self.open)
    @rule()
    def begin(self) -> None:
        n = self._identity()
        self.writer.begin(frame(n), np.array([n]))
        self.model.commit(n, True, False, self.capacity)
        self.open = True

    @precondition(lambda self: self.open)
    @rule(steps=st.integers(1, 8), ends=st.booleans())
    def append(self, steps: int, ends: bool) -> None:
        for step in range(steps):
            n = self._identity()
            last = ends and step == steps - 1
            self.writer.append(frame(n), np.array([n, -n]), n, 0.5, np.array([n]), last)
            self.model.commit(n, False, last, self.capacity)
        self.open = not ends

    @rule()
    def another_writer(self) -> None:
        self.writer.close()
        self.writer = self.buffer.writer("toy")
        self.model.roll_back(self.model.sealed)
        self.open = False

    @rule()
    def discard_last_episode(self) -> None:
        self.writer.discard_last_episode()
        firsts = [
            step
            for step in range(self.model.floor, len(self.model.steps))
            if self.model.steps[step][1]
        ]
        self.model.roll_back(firsts[-1] if firsts else self.model.floor)
        self.open = False

    @precondition(lambda self: self.path is not None)
    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.buffer = ReplayBuffer.open(self.path)
        self.another_writer()

    @invariant()
    def agrees(self) -> None:
        expected = self.model.transitions()
        assert self.buffer.cursor("toy") == len(self.model.steps)
        slots = self.buffer.indices("toy")
        assert self.buffer.num_transitions("toy") == len(expected)
        before = ids(self.buffer.observations("toy", (slots - 1) % self.capacity))
        after = ids(self.buffer.observations("toy", slots))
        assert list(zip(before, after, strict=True)) == expected
        arrays = self.buffer.arrays("toy")
        newest = [after[-1] for _, after in expected]
        assert arrays["rewards"][slots].tolist() == newest
        assert arrays["actions"][slots, 1].tolist() == [-n for n in newest]
        assert arrays["states"][slots, 0].tolist() == newest
        assert (arrays["discounts"][slots] == 0.5).all()
        pairs = [
            (int(a), int(b))
            for episode in self.buffer.episodes("toy")
            for a, b in itertools.pairwise(episode)
        ]
        assert pairs == [(int(s - 1) % self.capacity, int(s)) for s in slots]
        if expected:
            batch = self.buffer.sample("toy", 16, pad=0)
            drawn = zip(ids(batch.obs), ids(batch.next_obs), strict=True)
            assert set(drawn) <= set(expected)
            assert batch.reward.tolist() == [ids_[-1] for ids_ in ids(batch.next_obs)]

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
        if getattr(self, "directory", None):
            shutil.rmtree(self.directory)


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
