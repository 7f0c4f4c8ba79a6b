"""The presets: what paper and best promise, and that their code paths run."""

from dataclasses import replace

import dot_env
import pytest
import small

from crpt.config import PRESETS, CollectConfig, FinetuneConfig, PretrainConfig
from crpt.run_directory import RunDirectory
from crpt.stages import Context
from crpt.train import train


def test_the_preset_paper_is_the_paper():
    paper = PRESETS["paper"]
    assert paper.collect == CollectConfig(
        domains=("cheetah_run", "walker_run", "quadruped_run"),
        transitions=100_000,
        episode_length=None,
        action_repeat=2,
        image_size=84,
        render="exact",
    )
    assert paper.pretrain == PretrainConfig(
        rounds=16_666,
        batch_size=512,
        batches="alternate",
        learning_rate=1e-4,
        frame_stack=3,
        shift_pad=4,
        projection_dim=128,
        predictor_hidden=512,
        prototypes=512,
        temperature=0.1,
        sinkhorn_iterations=3,
        target_rate=0.05,
        intrinsic="dot",
        intrinsic_weight=0.005,
        intrinsic_offset=1.5,
        embedding_norm="none",
        precision="auto",
    )
    assert paper.finetune == FinetuneConfig(
        task=paper.finetune.task,
        agent_steps=250_000,
        random_steps=1_000,
        action_repeat=2,
        batch_size=512,
        replay_capacity=40_000,
        encode="sampled",
        features="h",
        shift_pad=4,
        trunk_dim=50,
        hidden_dim=1024,
        discount=0.99,
        initial_temperature=0.1,
        learning_rate=1e-4,
        actor_every=2,
        target_every=2,
        target_rate=0.01,
        intrinsic_reward=0.2,
        queue_size=2_048,
        evaluate_every=5_000,
        evaluate_episodes=10,
    )


def test_the_preset_best_has_the_paper_s_data_and_budget():
    best, paper = PRESETS["best"], PRESETS["paper"]
    assert (best.collect, best.probe) == (paper.collect, paper.probe)
    for name in ("rounds", "batch_size", "objective", "frame_stack"):
        assert getattr(best.pretrain, name) == getattr(paper.pretrain, name)
    assert best.pretrain.embedding_norm == "batch"


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_the_paper_s_code_paths_run_with_a_small_budget(tmp_path, preset):
    paper = PRESETS[preset]
    stages = replace(
        paper,
        collect=replace(
            paper.collect, domains=("dot_red", "dot_blue"), transitions=40, image_size=20, workers=1
        ),
        pretrain=replace(paper.pretrain, rounds=2, batch_size=16),
        probe=small.PROBE,
        finetune=replace(
            paper.finetune,
            task="dot_red",
            agent_steps=30,
            random_steps=20,
            batch_size=16,
            replay_capacity=25,
            checkpoint_every=12,
            evaluate_episodes=1,
        ),
        evaluate=replace(paper.evaluate, episodes=1),
    )
    context = Context(RunDirectory(tmp_path), 0, progress=False, make_env=dot_env.make)
    text = train(context, stages)
    assert "uniform random policy" in text
