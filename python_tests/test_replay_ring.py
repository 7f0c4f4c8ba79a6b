"""The replay buffer against a plain list of episodes."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy_replay import SPEC, frame, ids

from crpt.replay import DomainSpec, ReplayBuffer

GAMMA = 0.5


def discount_of(identity: int) -> float:
    return identity % 3 / 2


@dataclass
class Step:
    identity: int
    first: bool
    last: bool


@dataclass
class Model:
    """The same ring, the slow way: every step by its number, until another one takes its slot."""

    capacity: int
    steps: dict[int, Step] = field(default_factory=dict)
    head: int = 0

    def commit(self, step: Step) -> None:
        self.steps.pop(self.head - self.capacity, None)
        self.steps[self.head] = step
        self.head += 1

    def roll_back(self, step: int) -> None:
        self.steps = {n: kept for n, kept in self.steps.items() if n < step}
        self.head = step

    def start_of_last_episode(self) -> int:
        n = self.head
        while n - 1 in self.steps and (n == self.head or not self.steps[n].first):
            n -= 1
        return n

    def roll_back_cut_episode(self) -> None:
        if not self.steps and self.head <= self.capacity:
            self.roll_back(0)
        newest = self.steps.get(self.head - 1)
        if newest is not None and not newest.last:
            self.roll_back(self.start_of_last_episode())

    def chain(self, n: int, steps: int, stack: int) -> list[int] | None:
        """n and the steps before it, `steps` of them and the frames of a stack; none if lost."""
        chain = [n]
        while True:
            if chain[-1] not in self.steps:
                return None
            if len(chain) == steps + stack:
                return chain
            first = self.steps[chain[-1]].first
            if first and len(chain) <= steps:
                return None
            chain.append(chain[-1] if first else chain[-1] - 1)

    def stack(self, chain: list[int]) -> tuple[int, ...]:
        return tuple(self.steps[n].identity for n in reversed(chain))

    def transitions(self, steps: int, stack: int) -> list[tuple[int, list[int]]]:
        found = ((n, self.chain(n, steps, stack)) for n in sorted(self.steps))
        return [(n, chain) for n, chain in found if chain is not None]


class RingMachine(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(1, 12), in_files=st.booleans(),
        stack=st.integers(1, 4), n_step=st.integers(1, 3),
    )  # fmt: skip
    def create(self, capacity: int, in_files: bool, stack: int, n_step: int) -> None:
        self.directory = tempfile.mkdtemp() if in_files else None
        self.path = Path(self.directory) / "data" if self.directory else None
        self.capacity = capacity
        self.views = {"frame_stack": stack, "n_step": n_step}
        spec = DomainSpec(
            capacity=capacity, action_shape=(2,), state_shape=(1,), frame_shape=SPEC.frame_shape
        )
        self.buffer = ReplayBuffer.create(self.path, {"toy": spec})
        self.writer = self.buffer.writer("toy")
        self.model = Model(capacity)
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
        self.model.commit(Step(n, first=True, last=False))
        self.open = True

    @precondition(lambda self: self.open)
    @rule(steps=st.integers(1, 8), ends=st.booleans(), at_once=st.booleans())
    def append(self, steps: int, ends: bool, at_once: bool) -> None:
        numbers = [self._identity() for _ in range(steps)]
        lasts = [ends and n == numbers[-1] for n in numbers]
        rows = [
            (frame(n), np.array([n, -n]), float(n), discount_of(n), np.array([n])) for n in numbers
        ]
        if at_once:
            self.writer.extend(*(np.array(column) for column in zip(*rows, strict=True)), ends)
        else:
            for row, last in zip(rows, lasts, strict=True):
                self.writer.append(*row, last)
        for n, last in zip(numbers, lasts, strict=True):
            self.model.commit(Step(n, first=False, last=last))
        self.open = not ends

    @rule(shared=st.booleans())
    def another_writer(self, shared: bool) -> None:
        self.writer.close()
        if shared:  # rolls nothing back
            self.buffer.writer("toy", shared=True).close()
        self.writer = self.buffer.writer("toy")
        self.model.roll_back_cut_episode()
        self.open = False

    @rule()
    def discard_last_episode(self) -> None:
        self.writer.discard_last_episode()
        self.model.roll_back(self.model.start_of_last_episode())
        self.open = False

    @precondition(lambda self: self.path is not None)
    @rule()
    def reopen(self) -> None:
        self.writer.close()
        self.buffer = ReplayBuffer.open(self.path)
        self.another_writer(shared=False)

    @invariant()
    def agrees(self) -> None:
        stack, n_step = self.views["frame_stack"], self.views["n_step"]
        expected = self.model.transitions(n_step, stack)
        assert self.buffer.cursor("toy") == self.model.head
        slots = self.buffer.indices("toy", **self.views)
        assert slots.tolist() == [n % self.capacity for n, _ in expected]
        assert self.buffer.num_transitions("toy", **self.views) == len(expected)
        arrays = self.buffer.arrays("toy")
        newest = [self.model.steps[n].identity for n, _ in expected]
        assert arrays["states"][slots, 0].tolist() == newest
        batch = self.buffer.gather("toy", slots, pad=0, gamma=GAMMA, **self.views)
        wanted = [self._row(chain) for _, chain in expected]
        assert self._rows(batch) == wanted
        if expected:
            drawn = self.buffer.sample("toy", 16, pad=0, gamma=GAMMA, **self.views)
            assert all(row in wanted for row in self._rows(drawn))
        else:
            with pytest.raises(ValueError, match="toy has no transitions"):
                self.buffer.sample("toy", 16, gamma=GAMMA, **self.views)
        self._agrees_on_episodes(stack)

    def _row(self, chain: list[int]) -> tuple[object, ...]:
        n_step = self.views["n_step"]
        stack = self.views["frame_stack"]
        reward, discount = 0.0, 1.0
        for n in reversed(chain[:n_step]):
            identity = self.model.steps[n].identity
            reward += discount * identity
            discount *= GAMMA * discount_of(identity)
        action = self.model.steps[chain[n_step - 1]].identity
        return (
            self.model.stack(chain[n_step:]), self.model.stack(chain[:stack]),
            [action, -action], reward, discount,
        )  # fmt: skip

    @staticmethod
    def _rows(batch) -> list[tuple[object, ...]]:
        return list(
            zip(
                ids(batch.obs),
                ids(batch.next_obs),
                batch.action.tolist(),
                batch.reward.tolist(),
                batch.discount.tolist(),
                strict=True,
            )
        )

    def _agrees_on_episodes(self, stack: int) -> None:
        episodes: list[list[int]] = []
        for n, _ in self.model.transitions(0, stack):
            if self.model.steps[n].first or not episodes or episodes[-1][-1] != n - 1:
                episodes.append([])
            episodes[-1].append(n)
        found = self.buffer.episodes("toy", frame_stack=stack)
        assert [e.tolist() for e in found] == [[n % self.capacity for n in e] for e in episodes]
        steps = [n for e in episodes for n in e]
        stacks = self.buffer.observations(
            "toy", np.array(steps, np.int64) % self.capacity, frame_stack=stack
        )
        assert ids(stacks) == [self.model.stack(self.model.chain(n, 0, stack)) for n in steps]

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
        if getattr(self, "directory", None):
            shutil.rmtree(self.directory)


TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
