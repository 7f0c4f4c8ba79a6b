"""Agent, replay and environment of one run: what an episode does, and what a checkpoint holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crpt.agents import SAC, IntrinsicReward
from crpt.agents.features import FeatureExtractor
from crpt.agents.policy import mean_action
from crpt.agents.replay import LONGEST_EPISODE, AgentReplay, ring_capacity
from crpt.collect.random_play import discount_of, state_of
from crpt.config import FinetuneConfig
from crpt.encoder import Encoder
from crpt.evaluate import episode_seed, evaluate_policy, summary
from crpt.replay import DomainSpec
from crpt.run_directory import RunDirectory
from crpt.seeds import stream_seed

STAGE = "finetune"
MakeEnv = Callable[[], gymnasium.Env[Any, Any]]
"""Makes an environment of observation stacks, uint8 [C, H, W], and actions in [-1, 1]."""
# Streams of random numbers of one run, kept apart.
TRAIN, EXPLORE, EVALUATE, AGENT, REPLAY, INTRINSIC = range(6)


@dataclass
class Counters:
    """Where the loop stands; part of the checkpoint."""

    agent_steps: int = 0
    episodes: int = 0
    replay_steps: int = 0


class Finetuner:
    """Agent, replay and environment of one run; one episode at a time."""

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: Encoder,
        run: RunDirectory,
        make_env: MakeEnv,
        *,
        seed: int,
        device: torch.device,
        saved: dict[str, Any] | None = None,
    ) -> None:
        """Go on from a checkpoint, or begin."""
        self.config = config
        self.run = run
        self.seeds = [stream_seed(seed, stream) for stream in range(6)]
        self.counters = Counters(**saved["counters"]) if saved else Counters()
        self.losses: dict[str, Tensor] = {}
        self._between_episodes: dict[str, Any] | None = None
        self.env, self.evaluation_env = make_env(), make_env()
        space = self.env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        self.space = space
        if config.embedding_statistics == "task" and encoder.config.embedding_norm == "none":
            raise ValueError(
                "embedding_statistics should be pretraining for an encoder without embedding_norm, "
                "got task"
            )
        self.extractor = FeatureExtractor(encoder, config.features, device)
        self.agent = SAC(
            self.extractor.dim, space.shape[0], config, seed=self.seeds[AGENT], device=device
        )
        self.intrinsic = self._intrinsic_reward()
        self.replay = AgentReplay(
            run.checkpoint_dir / "finetune_replay",
            config,
            self.extractor,
            self._replay_spec(),
            device=device,
            seed=self.seeds[REPLAY],
            transitions=self.counters.agent_steps,
            steps=self.counters.replay_steps,
        )
        if saved:
            self._load_state(saved)

    def run_episode(
        self, on_step: Callable[[], None], check_stop: Callable[[], None]
    ) -> float | None:
        """Act, store and learn for one episode; its return, or None if `agent_steps` cut it short.

        `check_stop` may raise wherever the episode has more to come.
        """
        episode = self.counters.episodes
        obs, info = self.env.reset(seed=episode_seed(self.seeds[TRAIN], episode))
        rng = np.random.default_rng(episode_seed(self.seeds[EXPLORE], episode))
        encoded = self.encode(obs)
        self.replay.begin(obs[-3:], state_of(info), encoded)
        episode_return, ended, done = 0.0, False, False
        while not done:
            action = self._explore(encoded, rng)
            obs, reward, terminated, truncated, info = self.env.step(action)
            encoded = self.encode(obs)
            self.counters.agent_steps += 1
            out_of_steps = self.counters.agent_steps == self.config.agent_steps
            ended = terminated or truncated
            done = ended or out_of_steps
            discount = discount_of(info, terminated)
            self.replay.append(
                obs[-3:], action, float(reward), discount, state_of(info), done, encoded
            )
            episode_return += float(reward)
            if self.counters.agent_steps == self.config.random_steps:
                self._end_random_steps()
            if self.counters.agent_steps >= self.config.random_steps:
                self._update()
            if self.counters.agent_steps % self.config.evaluate_every == 0 or out_of_steps:
                self._evaluate(check_stop)
            on_step()
            if not done:
                check_stop()
        self.counters.episodes += 1
        self.counters.replay_steps = self.replay.steps
        return episode_return if ended else None

    def encode(self, obs: NDArray[np.uint8]) -> Tensor:
        return self.extractor(torch.from_numpy(obs)[None])[0]

    def _end_random_steps(self) -> None:
        if self.config.embedding_statistics == "task":
            self.extractor.standardise_by(self.replay.encoded())

    def _explore(self, encoded: Tensor, rng: np.random.Generator) -> NDArray[np.float32]:
        if self.counters.agent_steps < self.config.random_steps:
            return rng.uniform(self.space.low, self.space.high).astype(np.float32)
        action = self.agent.act(self.extractor.view(encoded[None])[0], explore=True).cpu()
        self._require_finite({"the agent's action": action}, "actions")
        chosen: NDArray[np.float32] = action.numpy()
        return chosen

    def _update(self) -> None:
        encoded = self.replay.sample()
        reward = encoded.reward
        if self.intrinsic is not None:
            bonus = self.intrinsic(self.extractor.embedding(encoded.next_features))
            reward = reward + self.config.intrinsic_reward * bonus
        batch = dataclasses.replace(
            encoded,
            features=self.extractor.view(encoded.features),
            reward=reward,
            next_features=self.extractor.view(encoded.next_features),
        )
        # Not every update moves the actor: of its losses the last ones stand.
        self.losses |= self.agent.update(batch)
        if self.counters.agent_steps % self.config.log_every == 0:
            self._require_finite(self.losses, "losses")
            values = {name: float(value) for name, value in self.losses.items()}
            self.run.log(STAGE, self.counters.agent_steps, **values)

    def _require_finite(self, tensors: dict[str, Tensor], what: str) -> None:
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
        if not finite.all():
            bad = [name for name, fine in zip(tensors, finite.tolist(), strict=True) if not fine]
            saved = self.run.has_checkpoint(STAGE)
            kept = "the last checkpoint is kept" if saved else "no checkpoint was written yet"
            raise FloatingPointError(
                f"{what} should be finite, got NaN or infinity in {', '.join(bad)} at agent step "
                f"{self.counters.agent_steps}; {kept}. Try a lower learning_rate."
            )

    def _evaluate(self, check_stop: Callable[[], None]) -> None:
        returns = evaluate_policy(
            mean_action(self.agent.actor, self.extractor),
            self.evaluation_env,
            self.config.evaluate_episodes,
            seed=self.seeds[EVALUATE],
            on_step=check_stop,
        )
        self.run.log(STAGE, self.counters.agent_steps, **summary(returns))

    def _intrinsic_reward(self) -> IntrinsicReward | None:
        c, prototypes = self.config, self.extractor.encoder.prototypes
        if c.intrinsic_reward == 0:
            return None
        if len(prototypes) == 0:
            raise ValueError(
                "intrinsic_reward should be 0 with an encoder that has no prototypes, got "
                f"{c.intrinsic_reward}"
            )
        return IntrinsicReward(prototypes, c.queue_size, seed=self.seeds[INTRINSIC])

    def _replay_spec(self) -> DomainSpec:
        _, info = self.env.reset(seed=0)
        size = self.extractor.encoder.config.image_size
        return DomainSpec(
            capacity=ring_capacity(self.config, self.extractor.frame_stack),
            action_shape=self.space.shape,
            state_shape=state_of(info).shape,
            frame_shape=(3, size, size),
        )

    def checkpoint_is_due(self, saved_at: int) -> bool:
        """After an episode: the time has come, the end, or the replay's room is used up."""
        c, done = self.config, self.counters.agent_steps
        longest = min(LONGEST_EPISODE, c.agent_steps - done)
        return done - saved_at >= c.checkpoint_every or longest == 0 or self.replay.room <= longest

    def save(self) -> None:
        """Raises FloatingPointError, and leaves the last checkpoint, if a weight is not finite."""
        self._require_finite(self.agent.weights(), "weights")
        if self.losses:
            self._require_finite(self.losses, "losses")
        self.run.save_checkpoint(STAGE, self.state())
        self.replay.keep()

    def remember(self) -> None:
        """Between two episodes: keep a copy of this moment, for `save_remembered`."""
        self._between_episodes = copy.deepcopy(self.state())

    def save_remembered(self) -> int | None:
        """Within an episode: `save` as of its beginning; the agent steps then, or None if no whole
        episode has been played since a run was begun or went on.

        A resumed run drops what the replay has of the episode and plays it again.
        """
        state = self._between_episodes
        if state is None:
            return None
        # What is not finite does not become finite again: fine now means fine then.
        self._require_finite(self.agent.weights(), "weights")
        self.run.save_checkpoint(STAGE, state)
        steps: int = state["counters"]["agent_steps"]
        return steps

    def state(self) -> dict[str, Any]:
        return {
            "counters": dataclasses.asdict(self.counters),
            "agent": self.agent.state(),
            "extractor": self.extractor.state(),
            "losses": self.losses,
            "replay_generator": self.replay.generator.get_state(),
            "intrinsic": self.intrinsic.state() if self.intrinsic else None,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.agent.load_state(state["agent"])
        self.extractor.load_state(state["extractor"])
        self.losses = {k: v.to(self.agent.device) for k, v in state["losses"].items()}
        self.replay.generator.set_state(state["replay_generator"])
        if self.intrinsic is not None:
            self.intrinsic.load_state(state["intrinsic"])

    def close(self) -> None:
        self.replay.close()
        self.env.close()
        self.evaluation_env.close()
