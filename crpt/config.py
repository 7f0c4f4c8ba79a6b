"""Every number of the method as a field, one frozen dataclass per stage, and the presets.

The defaults are the preset `paper`: arXiv 2302.05614 to the letter. A preset is a set of small
named differences from them (`PRESETS`); nothing changes a config after it was built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

RESUMABLE: dict[str, Any] = {"resumable": True}
"""Marks a field that may change when a run goes on: it says how, not what."""


@dataclass(frozen=True)
class CollectConfig:
    """Reward-free random play: what is recorded, where and how."""

    domains: tuple[str, ...] = ("cheetah_run", "walker_run", "quadruped_run")
    """dm_control tasks by name; only their dynamics and looks are used, never their rewards."""
    transitions: int = 100_000
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
    in software, other pixels."""
    workers: int = field(default=0, metadata=RESUMABLE)
    """Processes; 0: one per core, at most one per domain. The data does not depend on it."""


@dataclass(frozen=True)
class PretrainConfig:
    """Prototypical self-supervised pre-training of the encoder."""

    rounds: int = 16_666
    """One round is one update per domain, in turn."""
    batch_size: int = 512
    """Transitions per update."""
    batches: Literal["alternate", "mixed"] = "alternate"
    """alternate: the domains take turns, one a batch (the paper). mixed: every batch holds equal
    shares of all domains."""
    learning_rate: float = 1e-4
    """Of Adam, for encoder, projector, predictor and prototypes."""
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
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the convolutions and the projector; the objective and the weights are float32 always."""
    log_every: int = field(default=50, metadata=RESUMABLE)
    """Rounds between two lines of metrics."""
    checkpoint_every: int = field(default=500, metadata=RESUMABLE)
    """Rounds between two checkpoints."""


@dataclass(frozen=True)
class FinetuneConfig:
    """SAC on the frozen encoder."""

    task: str = "walker_run"
    """dm_control task to solve, from its pixels and its rewards."""
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
    work, which is what a CPU can do."""
    features: Literal["h", "z"] = "h"
    """What actor and critic see. h: the 39,200 convolutional features (the paper). z: the
    128-dimensional embedding, a tenth of the work of an update and all that pre-training through
    the prototypes has shaped."""
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
    """Agent steps between two checkpoints; one is written at the end of the episode that passes
    them."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The fine-tuned policy beside uniform random actions, on seeds of their own."""

    episodes: int = 10
    """Episodes of each."""


@dataclass(frozen=True)
class ProbeConfig:
    """What the frozen encoder knows of the simulator's state."""

    unseen: tuple[str, ...] = ("hopper_hop", "cartpole_swingup")
    """Domains to probe beside those of pre-training."""
    episodes: int = 60
    """Episodes of random play recorded per domain, apart from those of pre-training."""
    episode_length: int = 50
    """Agent steps of each: short, so that many begin from a random pose."""
    folds: int = 5
    """Parts into which the episodes are split; each is predicted by a probe fitted on the
    others."""


@dataclass(frozen=True)
class Stages:
    """The whole pipeline's config."""

    collect: CollectConfig = CollectConfig()
    pretrain: PretrainConfig = PretrainConfig()
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


Preset = Literal["quick", "paper"]

PRESETS: dict[Preset, Stages] = {
    "paper": Stages(),
    # Minutes on two cores without a GPU. What differs from the paper, differs for time (sizes, fast
    # rendering, an action repeat that plays as much with half the frames, stored embeddings) or to
    # learn within so few updates (embedding_norm, learning rates, updates of actor and target).
    "quick": Stages(
        collect=CollectConfig(
            domains=("cheetah_run", "walker_run", "hopper_hop"),
            transitions=3_000,
            episode_length=125,
            action_repeat=4,
            render="fast",
        ),
        pretrain=PretrainConfig(
            rounds=100,
            batch_size=128,
            learning_rate=1e-3,
            embedding_norm="batch",
            log_every=10,
            checkpoint_every=25,
        ),
        probe=ProbeConfig(unseen=("cartpole_swingup",), episode_length=40),
        finetune=FinetuneConfig(
            task="cheetah_run",
            agent_steps=6_000,
            action_repeat=4,
            batch_size=256,
            encode="stored",
            features="z",
            hidden_dim=256,
            learning_rate=1e-3,
            actor_every=1,
            target_every=1,
            target_rate=0.02,
            evaluate_every=3_000,
            evaluate_episodes=3,
            checkpoint_every=500,
        ),
        evaluate=EvaluateConfig(episodes=10),
    ),
}
