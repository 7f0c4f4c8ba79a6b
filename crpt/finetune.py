"""Fine-tuning: SAC on the frozen encoder's features (`python -m crpt.finetune`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from crpt.agents import SAC, IntrinsicReward
from crpt.agents.features import FeatureExtractor
from crpt.agents.replay import AgentReplay
from crpt.config import FinetuneConfig
from crpt.encoder import Encoder
from crpt.evaluate import Policy, episode_seed, evaluate_policy, summary
from crpt.interrupt import Interrupted, StopRequest
from crpt.replay import DomainSpec
from crpt.run_directory import RunDirectory

STAGE = "finetune"
MakeEnv = Callable[[], gymnasium.Env[Any, Any]]
"""Makes an environment of observation stacks, uint8 [C, H, W], and actions in [-1, 1]."""
# Streams of random numbers of one run, kept apart.
TRAIN, EVALUATE, AGENT, REPLAY, INTRINSIC = range(5)


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
    ) -> None:
        self.config = config
        self.run = run
        self.seeds = [episode_seed(seed, stream) for stream in range(5)]
        self.counters = Counters()
        self.env, self.evaluation_env = make_env(), make_env()
        space = self.env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        self.space = space
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
        )

    def run_episode(self, on_step: Callable[[], None]) -> float:
        """Act, store and learn for one episode; its return. Stops short at `agent_steps`."""
        obs, info = self.env.reset(seed=episode_seed(self.seeds[TRAIN], self.counters.episodes))
        rng = np.random.default_rng([self.seeds[TRAIN], self.counters.episodes])
        features = self.encode(obs)
        self.replay.begin(obs[-3:], info["state"], features)
        episode_return, done = 0.0, False
        while not done:
            action = self._explore(features, rng)
            obs, reward, terminated, truncated, info = self.env.step(action)
            features = self.encode(obs)
            self.counters.agent_steps += 1
            out_of_steps = self.counters.agent_steps == self.config.agent_steps
            done = terminated or truncated or out_of_steps
            self.replay.append(
                obs[-3:], action, float(reward), info["discount"], info["state"], done, features
            )
            episode_return += float(reward)
            if self.counters.agent_steps >= self.config.random_steps:
                self._update()
            if self.counters.agent_steps % self.config.evaluate_every == 0 or out_of_steps:
                self._evaluate()
            on_step()
        self.counters.episodes += 1
        self.counters.replay_steps = self.replay.steps
        return episode_return

    def encode(self, obs: NDArray[np.uint8]) -> Tensor:
        return self.extractor(torch.from_numpy(obs)[None])[0]

    def _explore(self, features: Tensor, rng: np.random.Generator) -> NDArray[np.float32]:
        if self.counters.agent_steps < self.config.random_steps:
            return rng.uniform(self.space.low, self.space.high).astype(np.float32)
        action: NDArray[np.float32] = self.agent.act(features, explore=True).cpu().numpy()
        return action

    def _update(self) -> None:
        batch = self.replay.sample()
        if self.intrinsic is not None:
            bonus = self.intrinsic(self.extractor.embedding(batch.next_features))
            reward = batch.reward + self.config.intrinsic_reward * bonus
            batch = dataclasses.replace(batch, reward=reward)
        metrics = self.agent.update(batch)
        if self.counters.agent_steps % self.config.log_every == 0:
            values = {name: float(value) for name, value in metrics.items()}
            if not all(math.isfinite(value) for value in values.values()):
                raise FloatingPointError(
                    f"losses should be finite, got {values} at agent step "
                    f"{self.counters.agent_steps}; "
                    "the last checkpoint is kept. Try a lower learning_rate."
                )
            self.run.log(STAGE, self.counters.agent_steps, **values)

    def _evaluate(self) -> None:
        returns = evaluate_policy(
            mean_action(self.agent, self.extractor),
            self.evaluation_env,
            self.config.evaluate_episodes,
            seed=self.seeds[EVALUATE],
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
        # What is sampled, and as much as may be written between two checkpoints: a run that goes on
        # from one
        # then finds all that the checkpoint's agent would have sampled. At least one slot in nine
        # begins an episode.
        transitions = min(self.config.agent_steps, self.config.replay_capacity)
        capacity = transitions + 2 * self.config.checkpoint_every
        return DomainSpec(
            capacity=capacity + capacity // 8 + 2,
            action_shape=self.space.shape,
            state_shape=np.shape(info["state"]),
            frame_shape=(3, size, size),
        )

    def state(self) -> dict[str, Any]:
        return {
            "counters": dataclasses.asdict(self.counters),
            "agent": self.agent.state(),
            "replay_generator": self.replay.generator.get_state(),
            "intrinsic": self.intrinsic.state() if self.intrinsic else None,
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, or from nothing."""
        if state is not None:
            self.counters = Counters(**state["counters"])
            self.agent.load_state(state["agent"])
            self.replay.generator.set_state(state["replay_generator"])
            if self.intrinsic is not None:
                self.intrinsic.load_state(state["intrinsic"])
        self.replay.rewind(self.counters.replay_steps)

    def close(self) -> None:
        self.replay.close()
        self.env.close()
        self.evaluation_env.close()


def mean_action(agent: SAC, extractor: FeatureExtractor) -> Policy:
    """The agent's policy without its noise."""

    def act(obs: NDArray[np.uint8]) -> NDArray[np.float32]:
        features = extractor(torch.from_numpy(obs)[None])[0]
        action: NDArray[np.float32] = agent.act(features, explore=False).cpu().numpy()
        return action

    return act


def trained_policy(
    config: FinetuneConfig,
    encoder: Encoder,
    env: gymnasium.Env[Any, Any],
    checkpoint: dict[str, Any],
    *,
    device: str = "cpu",
) -> Policy:
    """The mean-action policy of a checkpoint."""
    extractor = FeatureExtractor(encoder, config.features, torch.device(device))
    assert env.action_space.shape is not None
    agent = SAC(
        extractor.dim, env.action_space.shape[0], config, seed=0, device=torch.device(device)
    )
    agent.load_state(checkpoint["agent"])
    return mean_action(agent, extractor)


def finetune(
    config: FinetuneConfig,
    encoder: Encoder,
    run: RunDirectory,
    make_env: MakeEnv,
    *,
    seed: int,
    device: str = "cpu",
    progress: bool = True,
) -> Policy:
    """Train for `config.agent_steps` on one task, from the last checkpoint on; returns the
    mean-action policy.

    Raises Interrupted on Ctrl-C; the run goes on from the checkpoint of the last whole episodes.
    """
    saved = run.load_checkpoint(STAGE)
    if saved is not None and saved["counters"]["agent_steps"] >= config.agent_steps:
        env = make_env()
        try:
            return trained_policy(config, encoder, env, saved, device=device)
        finally:
            env.close()
    finetuner = Finetuner(config, encoder, run, make_env, seed=seed, device=torch.device(device))
    counters = finetuner.counters
    try:
        finetuner.load_state(saved)
        counters = finetuner.counters
        run.rewind_metrics(STAGE, counters.agent_steps)
        saved_at = counters.agent_steps
        bar = tqdm(
            total=config.agent_steps,
            initial=saved_at,
            desc="finetune",
            unit="step",
            disable=not progress,
        )
        with StopRequest() as stop, bar:

            def on_step() -> None:
                bar.update()
                if stop.requested:
                    raise Interrupted(
                        f"finetune stopped at agent step {counters.agent_steps} of "
                        f"{config.agent_steps}; "
                        f"it goes on from step {saved_at}"
                    )

            while counters.agent_steps < config.agent_steps:
                episode_return = finetuner.run_episode(on_step)
                bar.set_postfix({"return": f"{episode_return:.1f}"})
                run.log(STAGE, counters.agent_steps, train_return=round(episode_return, 3))
                last = counters.agent_steps >= config.agent_steps
                if counters.agent_steps - saved_at >= config.checkpoint_every or last:
                    run.save_checkpoint(STAGE, finetuner.state())
                    saved_at = counters.agent_steps
    finally:
        finetuner.close()
    return mean_action(finetuner.agent, finetuner.extractor)


if __name__ == "__main__":
    from crpt.commands import run

    run("finetune")
