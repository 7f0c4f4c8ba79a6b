import math

import numpy as np
import pytest

from crpt.config import (
    PRESETS,
    CollectConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    Stages,
)


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (CollectConfig, "domains", (), "domains should have at least one name, got none"),
        (CollectConfig, "domains", ("a", "a"), r"domains should be different, got \['a', 'a'\]"),
        (CollectConfig, "transitions", 0, "transitions should be at least 1, got 0"),
        (CollectConfig, "episode_length", 0, "episode_length should be at least 1"),
        (CollectConfig, "render", "Fast", "render should be one of exact, fast, got 'Fast'"),
        (PretrainConfig, "intrinsic", "Dot", "intrinsic should be one of dot, knn, none"),
        (PretrainConfig, "embedding_norm", "layer", "embedding_norm should be one of none, batch"),
        (PretrainConfig, "rounds", -1, "rounds should be at least 1, got -1"),
        (PretrainConfig, "log_every", 0, "log_every should be at least 1"),
        (PretrainConfig, "learning_rate", math.nan, "learning_rate should be greater than 0"),
        (PretrainConfig, "learning_rate", math.inf, "learning_rate should be greater than 0"),
        (PretrainConfig, "temperature", 0.0, "temperature should be greater than 0"),
        (PretrainConfig, "target_rate", 3.0, r"target_rate should be in \[0, 1\], got 3.0"),
        (FinetuneConfig, "discount", 2.0, r"discount should be in \[0, 1\]"),
        (FinetuneConfig, "replay_capacity", 0, "replay_capacity should be at least 1"),
        (FinetuneConfig, "shift_pad", -1, "shift_pad should be at least 0"),
        (FinetuneConfig, "evaluate_every", 0, "evaluate_every should be at least 1"),
        (FinetuneConfig, "random_steps", 250_000, "or nothing is learned, got 250000"),
        (EvaluateConfig, "episodes", 0, "episodes should be at least 1"),
        (ProbeConfig, "folds", 61, "folds should be at most the number of episodes, 60, got 61"),
    ],
)
def test_values_that_cannot_work_are_named(config, field, value, message):
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (PretrainConfig, "rounds", 2.5, "rounds should be int, got 2.5"),
        (PretrainConfig, "log_every", 1.5, "log_every should be int, got 1.5"),
        (PretrainConfig, "batch_size", 16.0, "batch_size should be int, got 16.0"),
        (PretrainConfig, "prototypes", np.float64(8), r"prototypes should be int, got .*8\.0"),
        (PretrainConfig, "rounds", True, "rounds should be int, got True"),
        (PretrainConfig, "learning_rate", "1e-3", "learning_rate should be float, got '1e-3'"),
        (PretrainConfig, "learning_rate", True, "learning_rate should be float, got True"),
        (PretrainConfig, "domains", "dot_red", "domains should be a tuple of str, got 'dot_red'"),
        (PretrainConfig, "domains", ["a"], r"domains should be a tuple of str, got \['a'\]"),
        (CollectConfig, "domains", ("a", 3), r"domains should be a tuple of str, got \('a', 3\)"),
        (CollectConfig, "transitions", None, "transitions should be int, got None"),
        (CollectConfig, "episode_length", 2.0, "episode_length should be int or none, got 2.0"),
        (CollectConfig, "workers", "two", "workers should be int or auto, got 'two'"),
        (FinetuneConfig, "task", None, "task should be str, got None"),
        (EvaluateConfig, "episodes", 2.5, "episodes should be int, got 2.5"),
        (ProbeConfig, "folds", "5", "folds should be int, got '5'"),
        (Stages, "collect", PretrainConfig(), "collect should be CollectConfig, got "),
    ],
)
def test_values_of_other_types_are_named(config, field, value, message):
    with pytest.raises(TypeError, match=message):
        config(**{field: value})


def test_whole_numbers_are_good_enough_for_fractions():
    config = PretrainConfig(learning_rate=1, temperature=np.float64(0.5))
    assert (config.learning_rate, config.temperature) == (1, 0.5)
    assert CollectConfig(episode_length=None, workers=2).workers == 2


def test_fields_that_depend_on_each_other():
    with pytest.raises(ValueError, match="batch_size should be at least 2, got 1"):
        PretrainConfig(batch_size=1, embedding_norm="batch")
    with pytest.raises(ValueError, match="prototypes should be at least 3, got 2"):
        PretrainConfig(prototypes=2, intrinsic="knn")
    with pytest.raises(ValueError, match=r"pretrain\.batch_size should be at least the number"):
        Stages(pretrain=PretrainConfig(batch_size=2, batches="mixed"))
    with pytest.raises(ValueError, match=r"finetune\.queue_size should be at least the number"):
        Stages(finetune=FinetuneConfig(queue_size=100))
    Stages(finetune=FinetuneConfig(queue_size=100, intrinsic_reward=0.0))


def test_presets_are_valid_and_immutable():
    assert set(PRESETS) == {"quick", "best", "paper"}
    with pytest.raises(AttributeError):
        PRESETS["paper"].pretrain.rounds = 3  # type: ignore[misc]
