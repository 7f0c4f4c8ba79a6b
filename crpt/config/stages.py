"""Every number of the method as a field, one frozen dataclass per stage.

The defaults are the preset `paper`: arXiv 2302.05614 to the letter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from crpt.config.checks import check_types
from crpt.config.weights import check_weights

Objective = Literal["crptpro", "atc", "byol", "autoencoder"]

RESUMABLE: dict[str, Any] = {"resumable": True}
"""Marks a field that may change when a run goes on: it says how, not what."""
GROWS: dict[str, Any] = {"grows_until": "pretrain"}
"""Marks a field of which more may be asked for until that stage has left something."""
ABSENT = "absent"
"""Marks a field with what runs have done that were begun before there was such a field."""


def _check_least(config: Any, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"{name} should be at least {bound}, got {value}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} should be greater than 0, got {value}")


def _check_rates(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} should be in [0, 1], got {value}")


@dataclass(frozen=True)
class CollectConfig:
    """Reward-free random play: what is recorded, where and how."""

    domains: tuple[str, ...] = field(
        default=("cheetah_run", "walker_run", "quadruped_run"), metadata=GROWS
    )
    """dm_control tasks by name, Gymnasium environments by id; only their dynamics and looks are
    used, never their rewards."""
    transitions: int = field(default=100_000, metadata=GROWS)
    """Transitions per domain, in agent steps."""
    episode_length: int | None = None
    """Agent steps per episode; none: the task's own time limit. Shorter episodes start more often
    from a random pose."""
    action_repeat: int = 2
    """Environment steps per agent step, with the same action."""
    image_size: int = 84
    """Height and width of a frame, in pixels."""
    render: Literal["exact", "fast"] = "exact"
    """exact: the pixels of dm_control. fast: no shadows and no multisampling, several times faster
    in software, other pixels. Gymnasium's environments draw as they do."""
    workers: int | Literal["auto"] = field(default="auto", metadata=RESUMABLE)
    """Processes, also for one domain; auto: one per core. The data does not depend on it."""

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.domains) == 0:
            raise ValueError("domains should have at least one name, got none")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains should be different, got {list(self.domains)}")
        _check_least(self, transitions=1, episode_length=1, action_repeat=1, image_size=1)
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"workers should be auto or at least 1, got {self.workers!r}")


@dataclass(frozen=True)
class PretrainConfig:
    """Self-supervised pre-training of the encoder."""

    objective: Objective = "crptpro"
    """What is minimised: prototypes (the paper), or one of the comparators under the same data and
    budget: augmented temporal contrast, self-prediction one step ahead, pixel reconstruction."""
    rounds: int = 16_666
    """One round is as many updates as there are domains: one of each, in turn, unless their weights
    differ."""
    batch_size: int = 512
    """Transitions per update."""
    domains: tuple[str, ...] = ()
    """Of the dataset, those to train on; none: all. One that is named twice has two turns in a
    round, or two shares of a mixed batch."""
    weights: tuple[float, ...] = field(default=(), metadata={ABSENT: []})
    """Of `domains`, which are to be named then, in their order; none: equal ones. A domain's turns,
    or its rows of a mixed batch, are in proportion to its weight."""
    batches: Literal["alternate", "mixed"] = "alternate"
    """alternate: the domains take turns, one a batch (the paper). mixed: every batch holds shares
    of all domains, equal ones unless their weights differ."""
    learning_rate: float = 1e-4
    """Of Adam, for encoder, projector, predictor and prototypes."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate: as it is, or falling to 0 at the end along half a cosine."""
    frame_stack: int = 3
    """Consecutive frames that make an observation."""
    shift_pad: int = 4
    """Random shift of each view, in pixels; 0: none."""
    projection_dim: int = 128
    """Dimension of an embedding and of a prototype."""
    predictor_hidden: int = 512
    """Hidden units of the predictor."""
    prototypes: int = 512
    """Number of prototypes M, shared by all domains."""
    temperature: float = 0.1
    """T of the softmax and of the Sinkhorn kernel."""
    sinkhorn_iterations: int = 3
    """Rounds of normalising prototypes, then samples."""
    target_rate: float = 0.05
    """Step of the target's exponential moving average at each update."""
    intrinsic: Literal["dot", "knn", "none"] = "dot"
    """What pushes the prototypes apart: the paper's ratio of dot products; its nearest-neighbour
    ablation; nothing."""
    intrinsic_weight: float = 0.005
    """Weight of the intrinsic loss beside the comparison loss."""
    intrinsic_offset: float = 1.5
    """The constant in the denominator of the intrinsic loss."""
    embedding_norm: Literal["none", "batch"] = "none"
    """batch standardises embeddings over the batch: without it (the paper) the loss starts on a
    plateau it seldom leaves."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the convolutions and the projector; the objective and the weights are float32 always.
    auto: bf16 on a GPU or a CPU that has units for it (AMX; AMD's AVX512_BF16), fp32
    elsewhere."""
    log_every: int = field(default=50, metadata=RESUMABLE)
    """Rounds between two lines of metrics."""
    checkpoint_every: int = field(default=500, metadata=RESUMABLE)
    """Rounds between two checkpoints."""
    keep_checkpoints: int = field(default=2, metadata=RESUMABLE)
    """The last ones, that stay."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_least(
            self,
            rounds=1,
            keep_checkpoints=1,
            batch_size=2 if self.embedding_norm == "batch" else 1,
            frame_stack=1,
            shift_pad=0,
            projection_dim=1,
            predictor_hidden=1,
            prototypes=3 if self.intrinsic == "knn" else 1,
            sinkhorn_iterations=0,
            intrinsic_weight=0,
            log_every=1,
            checkpoint_every=1,
        )
        _check_positive(self, "learning_rate", "temperature", "intrinsic_offset")
        _check_rates(self, "target_rate")
        if self.batches == "mixed":
            check_weights(self.weights, self.domains, self.batch_size, "row of a mixed batch")
        else:
            turns = self.rounds * len(self.domains)
            check_weights(self.weights, self.domains, turns, "turn")


@dataclass(frozen=True)
class FinetuneConfig:
    """SAC on the frozen encoder."""

    task: str = "walker_run"
    """dm_control task or Gymnasium id to solve, from its pixels and its rewards."""
    agent_steps: int = 250_000
    """Decisions of the agent; times action_repeat, environment steps."""
    random_steps: int = 1_000
    """Agent steps with uniform actions before the first update."""
    action_repeat: int = 2
    """Environment steps per agent step."""
    batch_size: int = 512
    """Transitions per update; one update per agent step."""
    replay_capacity: int = 40_000
    """Transitions to learn from: the latest ones."""
    encode: Literal["sampled", "stored"] = "sampled"
    """sampled: shift and encode every sampled observation (the paper). stored: encode each
    observation once, unshifted, when it is stored: no augmentation, and a hundred times less
    work, which is what a CPU can do. The features are kept in memory as float16."""
    features: Literal["h", "z"] = "h"
    """What actor and critic see. h: the 39,200 convolutional features (the paper). z: the
    128-dimensional embedding, a tenth of the work of an update and all that pre-training through
    the prototypes has shaped."""
    embedding_statistics: Literal["pretraining", "task"] = "pretraining"
    """Mean and deviation by which embedding_norm standardises z. pretraining: those of all its
    domains together, in which the frames of one task are all but the same. task: those of the
    task's own random steps, from their end on."""
    shift_pad: int = 4
    """Random shift of sampled observations, in pixels; unused with encode stored."""
    trunk_dim: int = 50
    """Outputs of the first layer of actor and critic."""
    hidden_dim: int = 1024
    """Hidden units of the two hidden layers of actor and critic."""
    discount: float = 0.99
    """gamma of an agent step."""
    initial_temperature: float = 0.1
    """alpha at the start; learned, with target entropy -|A|."""
    learning_rate: float = 1e-4
    """Of Adam, for actor, critic and temperature."""
    actor_every: int = 2
    """Critic updates per update of actor and temperature."""
    target_every: int = 2
    """Critic updates per update of the target critic."""
    target_rate: float = 0.01
    """Step of the target critic's exponential moving average."""
    intrinsic_reward: float = 0.2
    """Weight of the intrinsic reward beside the task's; 0: none."""
    queue_size: int = 2_048
    """Embeddings among which the intrinsic reward looks for neighbours."""
    evaluate_every: int = 5_000
    """Agent steps between two evaluations; also at the end."""
    evaluate_episodes: int = 10
    """Episodes of an evaluation, with the mean action, on their own seeds."""
    log_every: int = field(default=100, metadata=RESUMABLE)
    """Agent steps between two lines of losses."""
    checkpoint_every: int = field(default=5_000, metadata=RESUMABLE)
    """Agent steps between two checkpoints, at the end of an episode; sooner where the replay would
    overwrite what the last one needs."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_least(
            self,
            agent_steps=1,
            random_steps=0,
            action_repeat=1,
            batch_size=1,
            replay_capacity=1,
            shift_pad=0,
            trunk_dim=1,
            hidden_dim=1,
            actor_every=1,
            target_every=1,
            intrinsic_reward=0,
            queue_size=3,
            evaluate_every=1,
            evaluate_episodes=1,
            log_every=1,
            checkpoint_every=1,
        )
        _check_positive(self, "initial_temperature", "learning_rate")
        _check_rates(self, "discount", "target_rate")
        if self.embedding_statistics == "task" and self.random_steps < 2:
            raise ValueError(
                "random_steps should be at least 2 for the statistics of the task, got "
                f"{self.random_steps}"
            )
        if self.random_steps >= self.agent_steps:
            raise ValueError(
                f"random_steps should be less than agent_steps, {self.agent_steps}, or nothing is "
                f"learned, got {self.random_steps}"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """The fine-tuned policy beside uniform random actions, on seeds of their own."""

    episodes: int = field(default=10, metadata=RESUMABLE)
    """Episodes of each."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_least(self, episodes=1)


@dataclass(frozen=True)
class ProbeConfig:
    """What the frozen encoder knows of the simulator's state."""

    domains: tuple[str, ...] = field(default=(), metadata=RESUMABLE)
    """Domains to probe; those of pre-training count as seen, others as unseen. None: all that are
    seen, and `unseen`."""
    unseen: tuple[str, ...] = field(default=("hopper_hop", "cartpole_swingup"), metadata=RESUMABLE)
    """Domains to probe beside those of pre-training."""
    episodes: int = 60
    """Episodes of random play recorded per domain, apart from those of pre-training. A probe keeps
    all of h of one domain, 157 KB a frame, and solves systems of as many equations as frames."""
    episode_length: int = 50
    """Agent steps of each: short, so that many begin from a random pose."""
    folds: int = 5
    """Parts into which the episodes are split; each is predicted by a probe fitted on the
    others."""

    def __post_init__(self) -> None:
        check_types(self)
        _check_least(self, episodes=3, episode_length=1, folds=2)
        if self.folds > self.episodes:
            raise ValueError(
                f"folds should be at most the number of episodes, {self.episodes}, got {self.folds}"
            )


@dataclass(frozen=True)
class EncoderStages:
    """Of the pipeline, what makes an encoder and measures it."""

    collect: CollectConfig = CollectConfig()
    pretrain: PretrainConfig = PretrainConfig()
    probe: ProbeConfig = ProbeConfig()

    def __post_init__(self) -> None:
        check_types(self)
        if self.pretrain.batches == "mixed" and self.pretrain.batch_size < len(
            self.collect.domains
        ):
            raise ValueError(
                "pretrain.batch_size should be at least the number of domains with mixed batches, "
                f"{len(self.collect.domains)}, got {self.pretrain.batch_size}"
            )


@dataclass(frozen=True)
class Stages(EncoderStages):
    """The whole pipeline's config."""

    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            self.finetune.intrinsic_reward > 0
            and self.finetune.queue_size < self.pretrain.prototypes
        ):
            raise ValueError(
                "finetune.queue_size should be at least the number of prototypes, "
                f"{self.pretrain.prototypes}, got {self.finetune.queue_size}"
            )
