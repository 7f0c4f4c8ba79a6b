"""What the card of an exported encoder says, from training to text."""

from dataclasses import replace

import dot_env
import numpy as np
import pytest
import small
import torch

import crpt
from crpt.encoder import Encoder, EncoderConfig, EncoderFileError
from crpt.model_card import card
from crpt.pretrain import pretrain
from crpt.probe import probe
from crpt.replay import DomainSpec, ReplayBuffer, open_together
from crpt.run_directory import RunDirectory
from crpt.stages import Context, finetune_stage

TRAINING = replace(small.PRETRAIN, rounds=1)


def recorded(transitions, *, channels=3, metadata=None) -> ReplayBuffer:
    """A buffer of noise, with so many transitions of each domain."""
    shape = (channels, 20, 20)
    spec = DomainSpec(capacity=100, action_shape=(1,), frame_shape=shape, state_shape=(2,))
    buffer = ReplayBuffer.create(None, dict.fromkeys(transitions, spec), metadata)
    rng = np.random.default_rng(0)
    for domain, count in transitions.items():
        with buffer.writer(domain) as writer:
            for begin in range(0, count, 20):
                length = min(20, count - begin)
                frames = rng.integers(0, 256, (length + 1, *shape), np.uint8)
                states = rng.normal(size=(length + 1, 2))
                writer.begin(frames[0], states[0])
                for t in range(1, length + 1):
                    writer.append(frames[t], np.zeros(1), 0.0, 1.0, states[t], last=t == length)
    return buffer


def trained(buffer, path, config=TRAINING, seed=7) -> Encoder:
    return pretrain(config, buffer, RunDirectory(path), seed=seed, progress=False)


def text_of(buffer, path, config=TRAINING) -> str:
    encoder = trained(buffer, path, config)
    text = (path / "encoder" / "README.md").read_text()
    assert text == card(Encoder.from_pretrained(path))
    assert text == card(encoder)
    return text


def test_all_that_training_was_told_is_on_the_card(tmp_path):
    metadata = {"seed": 5, "render": "fast", "action_repeat": 4}
    text = text_of(recorded({"a": 60, "b": 60}, metadata=metadata), tmp_path)
    for line in (
        "| objective | crptpro |",
        "| learning rate | 0.001 |",
        "| intrinsic loss | dot |",
        "| intrinsic weight | 0.005 |",
        "| precision | fp32 |",
        "| seed | 7 |",
        "| seeds of the random play | 5 |",
        "| transitions per domain | 60 |",
        "| action repeat | 4 |",
        "| rendering | fast |",
        f"| versions | crpt {crpt.__version__}, torch {torch.__version__} |",
    ):
        assert line in text


def test_each_domain_has_its_own_transitions(tmp_path):
    text = text_of(recorded({"a": 60, "b": 20}), tmp_path)
    assert "| transitions per domain | a 60, b 20 |" in text
    assert "seeds of the random play" not in text  # nobody knows


def test_those_of_datasets_trained_on_together_are_added(tmp_path):
    small.dataset(tmp_path / "a", seed=1)
    small.dataset(tmp_path / "b", replace(small.COLLECT, domains=("dot_red",)), seed=2)
    text = text_of(open_together([tmp_path / "a", tmp_path / "b"]), tmp_path / "run")
    assert "| transitions per domain | dot_blue 120, dot_red 240 |" in text
    assert "| seeds of the random play | 1, 2 |" in text


def test_the_precision_is_the_one_that_was_used(tmp_path):
    encoder = trained(recorded({"a": 60}), tmp_path, replace(TRAINING, precision="auto"))
    assert encoder.metadata["precision"] in ("fp32", "bf16")


def test_an_objective_without_intrinsic_loss_has_none_on_its_card(tmp_path):
    for name, changes in {"atc": {"objective": "atc"}, "none": {"intrinsic": "none"}}.items():
        text = text_of(recorded({"a": 60}), tmp_path / name, replace(TRAINING, **changes))
        assert "intrinsic" not in text


@pytest.mark.parametrize(
    ("domains", "tagged"),
    [
        (["cheetah_run", "Pendulum-v1"], True),
        (["stack_2_bricks_vision"], True),
        (["Pendulum-v1", "ale_py:ALE/Pong-v5"], False),
        ([], False),
    ],
)
def test_only_domains_of_dm_control_are_tagged_so(domains, tagged):
    encoder = Encoder(EncoderConfig(image_size=20, projection_dim=16))
    encoder.metadata = {"domains": domains}
    tags = card(encoder).splitlines()[2]
    assert tags.startswith("tags: [reinforcement-learning, visual-rl")
    assert ("dm_control" in tags) == tagged


def test_frames_of_one_channel_are_stacked_as_in_training(tmp_path):
    buffer = recorded({"a": 60, "b": 60}, channels=1)
    text = text_of(buffer, tmp_path / "run")
    assert "3 stacked frames (channels of each: 1) of 20x20, uint8 [..., 3, 20, 20]" in text
    encoder = Encoder.from_pretrained(tmp_path / "run")
    assert (encoder.frame_stack, encoder.frame_channels) == (3, 1)
    initial = Encoder(encoder.config)
    result = probe(small.PROBE, buffer, encoder, initial, seen=("a", "b"), progress=False)
    slots = np.concatenate(buffer.episodes("a"))
    torch.testing.assert_close(result.z["a"], encoder.embed(buffer.observations("a", slots)))
    with pytest.raises(ValueError, match=r"of 20x20, \[1, 20, 20\], .* got c \[3, 20, 20\]"):
        probe(small.PROBE, recorded({"c": 60}), encoder, initial, seen=(), progress=False)


def test_environments_do_not_draw_frames_of_one_channel(tmp_path):
    metadata = {"render": "exact", "action_repeat": 2}
    trained(recorded({"a": 60}, channels=1, metadata=metadata), tmp_path / "run")
    with pytest.raises(EncoderFileError, match=r"RGB frames, \[3, 20, 20\], .* got \[1, 20, 20\]"):
        finetune_stage(
            Context(RunDirectory(tmp_path / "run"), 0, make_env=dot_env.make), small.FINETUNE
        )


def test_two_stacked_frames_are_told_from_their_channels(tmp_path):
    encoder = trained(recorded({"a": 60}), tmp_path, replace(TRAINING, frame_stack=2))
    assert (encoder.frame_stack, encoder.frame_channels) == (2, 3)
    assert "2 stacked RGB frames" in card(encoder)


def test_an_encoder_that_does_not_tell_is_taken_for_one_of_rgb_frames(tmp_path):
    encoder = Encoder(EncoderConfig(image_size=20, projection_dim=16))
    encoder.save_pretrained(tmp_path, metadata={"domains": ["cheetah_run"], "transitions": 3000})
    old = Encoder.from_pretrained(tmp_path)
    assert (old.frame_stack, old.frame_channels) == (3, 3)
    text = card(old)
    assert "3 stacked RGB frames" in text
    assert "| transitions per domain | 3000 |" in text
    assert "versions" not in text
