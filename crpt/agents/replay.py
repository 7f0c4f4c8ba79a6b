"""What the agent has experienced: frames on disk, features on demand or stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crpt.agents.features import FeatureExtractor
from crpt.agents.sac import FeatureBatch
from crpt.config import FinetuneConfig
from crpt.replay import DomainSpec, ReplayBuffer


class AgentReplay:
    """The latest `replay_capacity` transitions of a task, sampled as the frozen encoder's features.

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
    ) -> None:
        self.config = config
        self.extractor = extractor
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        if path.exists():
            self.buffer = ReplayBuffer.open(path)
        else:
            self.buffer = ReplayBuffer.create(path, {config.task: spec})
        self.writer = self.buffer.writer(config.task)
        self._features: Tensor | None = None
        if config.encode == "stored":
            slots = self.buffer.capacity(config.task)
            self._features = torch.zeros(slots, extractor.dim, dtype=torch.float16)
            self._encode_stored()

    @property
    def steps(self) -> int:
        """Steps committed so far, first frames included."""
        return self.buffer.cursor(self.config.task)

    def rewind(self, steps: int) -> None:
        """Drop the episodes after this step: the run goes on from a checkpoint that had not seen
        them."""
        while self.steps > steps:
            self.writer.discard_last_episode()

    def begin(self, frame: NDArray[np.uint8], state: NDArray[np.float64], features: Tensor) -> None:
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
        self.writer.append(frame, action, reward, discount, state, last)
        self._store(features)

    def sample(self) -> FeatureBatch:
        """A batch of the latest transitions, encoded: features [B, F]."""
        task, c = self.config.task, self.config
        latest = self.buffer.indices(task, frame_stack=self.extractor.frame_stack)[
            -c.replay_capacity :
        ]
        chosen = latest[
            torch.randint(len(latest), (c.batch_size,), generator=self.generator).numpy()
        ]
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

    def close(self) -> None:
        self.writer.close()

    def _store(self, features: Tensor) -> None:
        if self._features is not None:
            self._features[(self.steps - 1) % len(self._features)] = features

    def _encode_stored(self) -> None:
        assert self._features is not None
        task, stack = self.config.task, self.extractor.frame_stack
        for slot in (
            s for episode in self.buffer.episodes(task, frame_stack=stack) for s in episode
        ):
            # One at a time, as in acting: another batch size rounds otherwise.
            obs = self.buffer.observations(task, np.array([slot]), frame_stack=stack)
            self._features[slot] = self.extractor(obs)[0]
