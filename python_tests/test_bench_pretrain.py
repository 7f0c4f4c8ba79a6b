"""The usual way's updates are those that are timed against it."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from torch.utils.flop_counter import FlopCounterMode

from crpt import ops
from crpt.bench import pretrain as bench
from crpt.bench.usual_pretrain import UsualModel, UsualTrainer
from crpt.pretrain.trainer import Trainer

CONFIG = replace(small.PRETRAIN, batch_size=24, learning_rate=1e-4)


@pytest.fixture(scope="module")
def buffer():
    return bench.random_pixels(150, CONFIG.frame_stack, image_size=20)


def usual_like(trainer: Trainer) -> UsualTrainer:
    """The usual way, from the same weights."""
    ours = trainer.model
    model = UsualModel(9, 20, trainer.config)
    parts = [
        (model.encoder, ours.online.convolutions), (model.projector[0], ours.online.projector),
        (model.predictor, ours.predictor), (model.target_encoder, ours.target.convolutions),
        (model.target_projector[0], ours.target.projector),
    ]  # fmt: skip
    for theirs, mine in parts:
        theirs.load_state_dict(mine.state_dict())
    with torch.no_grad():
        model.prototypes.copy_(ours.prototypes)
    return UsualTrainer(model, trainer.config)


def test_its_views_are_those_of_the_operator(buffer):
    replay = bench.usual_replay(buffer, CONFIG.frame_stack)
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(replay), size=9)
    shifts = rng.integers(0, 5, size=(2, 9, 2))
    for views, stacks, shift in zip(
        replay.views(chosen, shifts, pad=2), (replay.obs, replay.next_obs), shifts - 2, strict=True
    ):
        expected = ops.random_shift(
            torch.from_numpy(stacks[chosen]).float() / 255, 2, torch.from_numpy(shift)
        )
        torch.testing.assert_close(views, expected)


def test_its_transitions_are_those_of_the_buffer(buffer):
    replay = bench.usual_replay(buffer, CONFIG.frame_stack)
    slots = buffer.indices(bench.DOMAIN)
    assert len(slots) == len(replay) == 200
    batch = buffer.gather(bench.DOMAIN, slots, pad=0, dtype=torch.float32)
    everything = np.arange(len(slots))
    obs, next_obs = replay.views(everything, np.zeros((2, len(slots), 2), np.int64), pad=0)
    torch.testing.assert_close(obs, batch.obs)
    torch.testing.assert_close(next_obs, batch.next_obs)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_its_losses_and_weights_follow_ours(buffer, norm):
    trainer = Trainer(
        replace(CONFIG, embedding_norm=norm), buffer, seed=0, device=torch.device("cpu")
    )
    usual = usual_like(trainer)
    for _ in range(4):
        obs, next_obs = trainer.sample((bench.DOMAIN,))
        loss, comparison, intrinsic = usual.losses(obs, next_obs)
        usual.backward(loss)
        usual.finish()
        losses = trainer.step(obs, next_obs)
        torch.testing.assert_close(losses.total, loss, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(losses.parts["comparison_loss"], comparison, atol=1e-4, rtol=0)
        torch.testing.assert_close(losses.parts["intrinsic_loss"], intrinsic, atol=1e-5, rtol=0)
    for mine, theirs in (
        (trainer.model.online.convolutions, usual.model.encoder),
        (trainer.model.target.convolutions, usual.model.target_encoder),
    ):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            # Of a movement of 4e-4. The median: standardising takes some biases out of the loss,
            # and Adam makes full steps of the rounding errors that are their gradient.
            assert (p - q).abs().median() < 2e-6


def test_the_arithmetic_of_an_update():
    # 95 MFLOP an image forward, four times that an update, less the gradient of the pixels.
    assert bench.flops(512) == pytest.approx(512 * (4 * 94.6e6 - 8.7e6), rel=0.01)
    model = UsualModel(9, 84, small.PRETRAIN)
    with FlopCounterMode(display=False) as counter:
        model.encoder(torch.zeros(1, 9, 84, 84))
    first = 2 * 41**2 * 32 * 9 * 9
    projector = 2 * 39_200 * 128
    assert bench.flops(1) == 4 * (counter.get_total_flops() + projector) - first


def test_the_passes_over_memory_of_an_update():
    # 190 MB of results for 512 images in bf16, seven times; 65 MB of pixels; 200 MB for 5 million
    # weights of the projector.
    bf16 = bench.moved(512, torch.bfloat16)
    assert bf16 == pytest.approx(7 * 190.3e6 + 65.0e6 + 200.7e6, rel=0.01)
    assert bench.moved(512, torch.float32) - bf16 == pytest.approx(7 * 190.3e6, rel=0.01)


@pytest.mark.slow  # three processes that import torch, one after the other on a busy machine
def test_the_command_times_both_sides(tmp_path, capsys):
    arguments = bench.PretrainArguments(
        batches=(4,), precisions=("fp32",), updates=3, transitions=100, device="cpu",
        json=tmp_path / "out.json",
    )  # fmt: skip
    assert bench.pretrain_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "usual fp32" in printed
    assert "ours fp32" in printed
    document = json.loads((tmp_path / "out.json").read_text())
    assert [row["side"] for row in document["rows"]] == ["usual fp32", "ours fp32"]
    phases = {"sample", "forward", "backward", "finish"}
    assert all(set(update) == phases for row in document["rows"] for update in row["updates"])
    assert all(row["products"] > 0 and row["passes"] > 0 for row in document["rows"])


def test_figures_that_are_no_use_are_refused():
    with pytest.raises(ValueError, match="should be at least 2"):
        bench.pretrain_command(bench.PretrainArguments(updates=1))
    with pytest.raises(
        ValueError, match="at least as many as the largest of batches, 512, got 100"
    ):
        bench.pretrain_command(bench.PretrainArguments(batches=(512, 64), transitions=100))


def test_a_side_that_fails_says_why_in_the_parent_s_error(capfd):
    config = replace(CONFIG, batch_size=101)
    message = "ours: ValueError: batch_size should be at most 100"
    with bench._side("ours", config, 100, "cpu") as ask, pytest.raises(RuntimeError, match=message):
        ask(1)
    assert "Traceback" not in capfd.readouterr().err


def test_a_side_that_is_killed_is_named():
    others = set(multiprocessing.active_children())
    with bench._side("ours", CONFIG, 100, "cpu") as ask:
        (child,) = set(multiprocessing.active_children()) - others
        child.kill()
        child.join()
        with pytest.raises(RuntimeError, match="the process of ours ended by -9"):
            ask(1)
