"""What pre-training is given: datasets of one's own, and what it refuses before it trains."""

from dataclasses import replace

import numpy as np
import pytest
import small
import torch

from crpt.pretrain import Trainer, pretrain
from crpt.replay import DomainSpec, ReplayBuffer
from crpt.run_directory import CheckpointError, RunDirectory


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data") / "dataset")


def train(config, buffer, path):
    return pretrain(config, buffer, RunDirectory(path), seed=0, progress=False)


def own_buffer(shapes, transitions=30, metadata=None):
    """A user's own buffer in memory: noise of the given [C, H, W] per domain."""
    counts = transitions if isinstance(transitions, dict) else dict.fromkeys(shapes, transitions)
    buffer = ReplayBuffer.create(
        None,
        {
            name: DomainSpec(capacity=64, action_shape=(1,), frame_shape=shape)
            for name, shape in shapes.items()
        },
        metadata,
    )
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        with buffer.writer(name) as writer:
            writer.begin(rng.integers(0, 256, shape, np.uint8), np.zeros(0))
            for n in range(counts[name]):
                frame = rng.integers(0, 256, shape, np.uint8)
                writer.append(frame, np.zeros(1), 0.0, 1.0, np.zeros(0), n == counts[name] - 1)
    return buffer


def test_a_buffer_of_one_s_own_needs_no_metadata(tmp_path):
    buffer = own_buffer({"mine": (1, 24, 24)})
    encoder = train(replace(small.PRETRAIN, rounds=1), buffer, tmp_path)
    assert (encoder.config.in_channels, encoder.config.image_size) == (3, 24)
    assert encoder.metadata["render"] is None
    assert encoder.metadata["action_repeat"] is None


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (lambda: own_buffer({}), "buffer should hold at least one domain, got none"),
        (
            lambda: own_buffer({"b": (3, 20, 20), "a": (3, 24, 24)}),
            r"should be of one shape \[C, S, S\], got a \[3, 24, 24\], b \[3, 20, 20\]",
        ),
        (
            lambda: own_buffer({"wide": (3, 20, 24)}),
            r"should be of one shape \[C, S, S\], got wide \[3, 20, 24\]",
        ),
        (
            lambda: own_buffer({"a": (3, 20, 20), "b": (3, 20, 20)}, {"a": 9, "b": 2}),
            "at least 3 transitions, as many as an observation has frames, got b 2;",
        ),
    ],
)
def test_a_buffer_that_cannot_be_trained_on_is_refused_before_training(tmp_path, buffer, message):
    with pytest.raises(ValueError, match=message):
        train(small.PRETRAIN, buffer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    buffer = own_buffer({"a": (3, 20, 20), "b": (3, 20, 20)}, {"a": 30, "b": 20})
    for batches, domains, most in (
        ("alternate", (), 20),
        ("alternate", ("a", "b", "b"), 20),
        ("mixed", (), 40),
        ("mixed", ("a", "b", "b"), 30),
    ):
        config = replace(small.PRETRAIN, batches=batches, domains=domains, rounds=1)
        path = tmp_path / f"{batches}{len(domains)}"
        with pytest.raises(
            ValueError, match=rf"batch_size .* at most {most}, .*\(a 30, b 20\), got {most + 1};"
        ):
            train(replace(config, batch_size=most + 1), buffer, path)
        train(replace(config, batch_size=most), buffer, path)


def test_a_mixed_batch_smaller_than_the_number_of_domains_is_refused(tmp_path):
    buffer = own_buffer(dict.fromkeys("abc", (3, 20, 20)))
    with pytest.raises(ValueError, match="number of domains, 3, with batches mixed, got 2"):
        train(replace(small.PRETRAIN, batches="mixed", batch_size=2), buffer, tmp_path)
    twice = replace(small.PRETRAIN, batches="mixed", batch_size=2, domains=("a", "a", "b"))
    with pytest.raises(ValueError, match="number of domains, 3, with batches mixed, got 2"):
        train(twice, buffer, tmp_path)


@pytest.mark.parametrize(
    "foreign",
    [{"epoch": 3}, [1, 2], {"round": 6}, "other sizes"],
    ids=["no round", "list", "bare", "sizes"],
)
def test_a_foreign_checkpoint_is_named_with_the_remedy(buffer, tmp_path, foreign):
    run = RunDirectory(tmp_path)
    if foreign == "other sizes":
        config = replace(small.PRETRAIN, prototypes=8, rounds=2)
        trainer = Trainer(config, buffer, seed=0, device=torch.device("cpu"))
        foreign = trainer.state()
    run.save_checkpoint("pretrain", foreign)
    with pytest.raises(CheckpointError, match=r"pretrain\.pt should be a checkpoint.*delete it"):
        train(small.PRETRAIN, buffer, tmp_path)
