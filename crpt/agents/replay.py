"""What the agent has experienced: frames on disk, features on demand or stored."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crpt.agents.features import FeatureExtractor
from crpt.agents.sac import FeatureBatch
from crpt.config import FinetuneConfig
from crpt.replay import DomainSpec, ReplayBuffer
from crpt.run_directory import CheckpointError

_BLOCK = 256  # observations encoded at once

LONGEST_EPISODE = 2_000
"""Transitions of the longest episode that the ring has room for at any moment."""


def ring_capacity(config: FinetuneConfig, frame_stack: int) -> int:
    """Slots in which a checkpoint's transitions outlive what is written until the next one.

    At worst every transition is an episode with a first step of its own: two slots each, and the
    frames of the oldest stack. Beyond them room for two of the longest episodes: one that uses up
    the room of another makes a checkpoint due.
    """
    kept = 2 * min(config.agent_steps, config.replay_capacity) + frame_stack
    return min(2 * config.agent_steps, kept + 2 * (LONGEST_EPISODE + 1))


class _Latest:
    """The slots of the newest n transitions, in a ring: number 0 is the oldest."""

    def __init__(self, n: int) -> None:
        self._slots = np.empty(n, np.int64)
        self._added = 0

    def add(self, slot: int) -> None:
        self._slots[self._added % len(self._slots)] = slot
        self._added += 1

    def __len__(self) -> int:
        return min(self._added, len(self._slots))

    def slots(self, number: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._slots[(self._added - len(self) + number) % len(self._slots)]

    def oldest(self) -> int:
        return int(self.slots(np.array(0)))


class AgentReplay:
    """The latest `replay_capacity` transitions of a task, sampled as the frozen encoder's features.

    What a checkpoint's agent would sample is not overwritten before the next one: the owner saves
    one when `room` is no longer enough for an episode, and says so with `keep`.

    With `encode: stored` every observation's features are kept beside its frames; they are a
    function of the frames and are computed again when a run goes on.
    """

    def __init__(
        self,
        path: Path,
        config: FinetuneConfig,
        extractor: FeatureExtractor,
        spec: DomainSpec,
        *,
        device: torch.device,
        seed: int,
        transitions: int = 0,
        steps: int = 0,
    ) -> None:
        """Go on after the first `steps` of the replay at `path`, which hold `transitions`; from
        none of them, begin anew.

        Raises CheckpointError if they are not there.
        """
        self.path = path
        self.config = config
        self.extractor = extractor
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        if steps == 0:
            shutil.rmtree(path, ignore_errors=True)  # no checkpoint has seen any of it
            ReplayBuffer.create(path, {config.task: spec})
        elif not path.exists():
            raise self._lost(f"{steps} steps", "nothing")
        self.buffer = ReplayBuffer.open(path)
        self.writer = self.buffer.writer(config.task)
        try:
            self._rewind(steps, min(transitions, config.replay_capacity))
        except BaseException:
            self.writer.close()
            raise
        self._latest = _Latest(config.replay_capacity)
        for slot in self._transitions():
            self._latest.add(int(slot))
        self._needed = self._oldest_needed()
        self._features: Tensor | None = None
        if config.encode == "stored":
            slots = self.buffer.capacity(config.task)
            self._features = torch.zeros(slots, extractor.dim, dtype=torch.float16)
            self._encode_stored()

    @property
    def steps(self) -> int:
        """Steps committed so far, first frames included."""
        return self.buffer.cursor(self.config.task)

    @property
    def room(self) -> int:
        """Steps to write before one is overwritten that was needed at the last `keep`."""
        return self._needed + self.buffer.capacity(self.config.task) - self.steps

    def keep(self) -> None:
        """A checkpoint has been saved: from now on it is this moment that a run may go back to."""
        self._needed = self._oldest_needed()

    def begin(self, frame: NDArray[np.uint8], state: NDArray[np.float64], features: Tensor) -> None:
        self._require_room()
        self.writer.begin(frame, state)
        self._store(features)

    def append(
        self,
        frame: NDArray[np.uint8],
        action: NDArray[np.float32],
        reward: float,
        discount: float,
        state: NDArray[np.float64],
        last: bool,
        features: Tensor,
    ) -> None:
        self._require_room()
        self.writer.append(frame, action, reward, discount, state, last)
        self._latest.add((self.steps - 1) % self.buffer.capacity(self.config.task))
        self._store(features)

    def sample(self) -> FeatureBatch:
        """A batch of the latest transitions, encoded: features [B, F]."""
        task, c = self.config.task, self.config
        number = torch.randint(len(self._latest), (c.batch_size,), generator=self.generator)
        chosen = self._latest.slots(number.numpy())
        if self._features is None:
            batch = self.buffer.gather(
                task,
                chosen,
                frame_stack=self.extractor.frame_stack,
                pad=c.shift_pad,
                device=self.device,
                generator=self.generator,
            )
            features, next_features = self.extractor(torch.cat([batch.obs, batch.next_obs])).chunk(
                2
            )
            return FeatureBatch(features, batch.action, batch.reward, batch.discount, next_features)
        before = (chosen - 1) % len(self._features)
        arrays = self.buffer.arrays(task)
        action, reward, discount = (
            torch.from_numpy(arrays[name][chosen]).to(self.device)
            for name in ("actions", "rewards", "discounts")
        )
        features, next_features = (
            self._features[torch.from_numpy(slots)].to(self.device, torch.float32)
            for slots in (before, chosen)
        )
        return FeatureBatch(features, action, reward, discount, next_features)

    def encoded(self) -> Iterator[Tensor]:
        """Every transition's next observation, encoded unshifted, oldest first: several [B, F]."""
        task, slots = self.config.task, self._latest.slots(np.arange(len(self._latest)))
        for begin in range(0, len(slots), _BLOCK):
            part = slots[begin : begin + _BLOCK]
            if self._features is not None:
                yield self._features[torch.from_numpy(part)].to(self.device, torch.float32)
            else:
                stack = self.extractor.frame_stack
                yield self.extractor(self.buffer.observations(task, part, frame_stack=stack))

    def close(self) -> None:
        self.writer.close()

    def _transitions(self) -> NDArray[np.int64]:
        """The slots of the transitions to learn from, oldest first, found in the buffer."""
        stack = self.extractor.frame_stack
        slots = self.buffer.indices(self.config.task, frame_stack=stack)
        return slots[-self.config.replay_capacity :]

    def _oldest_needed(self) -> int:
        """The first step of which a stack in `_latest` has a frame."""
        if len(self._latest) == 0:
            return self.steps
        age = (self.steps - 1 - self._latest.oldest()) % self.buffer.capacity(self.config.task)
        return max(0, self.steps - 1 - age - self.extractor.frame_stack)

    def _rewind(self, steps: int, transitions: int) -> None:
        """Drop the episodes after this step: the run goes on from a checkpoint that had not seen
        them."""
        task = self.config.task
        oldest = self.steps - sum(map(len, self.buffer.episodes(task, frame_stack=1)))
        if not oldest <= steps <= self.steps:
            raise self._lost(f"step {steps}", f"steps {oldest} to {self.steps}")
        if (
            steps
            and not self.buffer.arrays(task)["is_last"][(steps - 1) % self.buffer.capacity(task)]
        ):
            raise self._lost(f"an episode that ends before step {steps}", "none")
        while self.steps > steps:
            self.writer.discard_last_episode()
        found = len(self._transitions())
        if found != transitions:
            raise self._lost(f"{transitions} transitions", f"{found}")

    def _lost(self, wanted: str, got: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} should be the replay of the checkpoint beside it, with {wanted}, got "
            f"{got}; put it back, or delete the checkpoint to begin the stage again"
        )

    def _require_room(self) -> None:
        if self.room < 1:
            raise RuntimeError(
                f"an episode should be of at most {LONGEST_EPISODE} agent steps, got a longer one, "
                "and the replay has no room for more of it; give the environment a time limit "
                "(gymnasium.wrappers.TimeLimit)"
            )

    def _store(self, features: Tensor) -> None:
        if self._features is not None:
            self._features[(self.steps - 1) % len(self._features)] = features

    def _encode_stored(self) -> None:
        assert self._features is not None
        task, stack = self.config.task, self.extractor.frame_stack
        latest = self._transitions()
        for slot in np.union1d(latest, (latest - 1) % len(self._features)):
            # One at a time, as in acting: another batch size rounds otherwise.
            obs = self.buffer.observations(task, np.array([slot]), frame_stack=stack)
            self._features[slot] = self.extractor(obs)[0]
