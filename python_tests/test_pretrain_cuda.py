"""The engine of pre-training on a GPU: recorded updates, feeds and precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import rounded_encoder
import small
import torch

import crpt.pretrain.trainer
from crpt.byte_encoder import project_bytes
from crpt.encoder import Encoder, EncoderConfig
from crpt.objectives import OBJECTIVES
from crpt.pretrain import DivergenceError, Trainer, pretrain
from crpt.pretrain.streamed_feed import StreamedFeed
from crpt.pretrain.update_graph import WARM_UP
from crpt.run_directory import RunDirectory

pytestmark = pytest.mark.cuda

CONFIG = replace(small.PRETRAIN, learning_rate=2e-4, precision="fp32")
UPDATES = 20


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_waiting() -> Iterator[None]:
    """Waiting for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trainer(config, buffer, **options) -> Trainer:
    return Trainer(config, buffer, seed=1, device=torch.device("cuda", 0), **options)


def run(trainer: Trainer, updates: int = UPDATES) -> torch.Tensor:
    """The losses."""
    order = trainer.batches()
    return torch.stack([trainer.update(order[i % len(order)]).total for i in range(updates)])


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("batches", ["alternate", "mixed"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_recorded_updates_equal_those_that_are_written(buffer, batches, objective):
    config = replace(CONFIG, batches=batches, objective=objective)
    plain, recorded = trainer(config, buffer, cuda_graphs=False), trainer(config, buffer)
    begun = weights(plain)
    losses, replayed = run(plain), run(recorded)
    assert recorded._graphs.recorded == (1 if batches == "mixed" else 2)
    torch.testing.assert_close(replayed, losses.detach(), atol=2e-4, rtol=2e-4)
    moved = (weights(plain) - begun).norm()
    assert (weights(recorded) - weights(plain)).norm() < 0.02 * moved
    assert recorded.gradient_norm() == pytest.approx(plain.gradient_norm(), rel=0.02)


def test_updates_do_not_wait_for_the_device(buffer):
    for precision in ("fp32", "bf16"):
        run_ = trainer(replace(CONFIG, precision=precision), buffer)
        run(run_, 2 * WARM_UP)
        with no_waiting():
            losses = run(run_, UPDATES)
        assert run_._graphs.recorded == 2
        assert losses.isfinite().all()
        assert run_.watch.first_bad() is None


def test_auto_is_bf16_and_follows_fp32(buffer):
    bf16, fp32 = trainer(replace(CONFIG, precision="auto"), buffer), trainer(CONFIG, buffer)
    assert bf16.config.precision == "bf16"
    assert bf16.sample(("dot_red",))[0].dtype == torch.uint8  # by kernels of our own
    bf16.generator.set_state(fp32.generator.get_state())
    torch.testing.assert_close(run(bf16), run(fp32), atol=0.05, rtol=0.02)
    assert all(p.dtype == torch.float32 for p in bf16.model.parameters())


def test_frames_that_do_not_fit_are_streamed_to_the_same_losses(buffer, monkeypatch):
    resident = run(trainer(CONFIG, buffer))
    monkeypatch.setattr(crpt.pretrain.trainer, "fits", lambda *_: False)
    streamed = trainer(CONFIG, buffer)
    assert isinstance(streamed.feed, StreamedFeed)
    run(streamed, 2 * WARM_UP)
    with no_waiting():
        rest = run(streamed, UPDATES - 2 * WARM_UP)
    torch.testing.assert_close(rest, resident[2 * WARM_UP :], atol=2e-4, rtol=2e-4)


def test_a_resumed_run_follows_one_that_went_on(buffer):
    whole, first, second = (trainer(CONFIG, buffer) for _ in range(3))
    losses = run(whole)
    run(first, 10)
    state = first.state()
    on_cpu = {
        "model": {k: v.cpu() for k, v in state["model"].items()},
        "optimizer": state["optimizer"], "generator": state["generator"], "round": 5,
    }  # fmt: skip
    second.load_state(on_cpu)
    resumed = run(second, UPDATES - 10)
    torch.testing.assert_close(resumed, losses[10:], atol=2e-4, rtol=2e-4)
    assert second._graphs.recorded == 2


def test_a_checkpoint_of_a_cpu_goes_on_on_the_gpu(buffer):
    cpu = Trainer(CONFIG, buffer, seed=1, device=torch.device("cpu"))
    run(cpu, 10)
    gpu = trainer(CONFIG, buffer)
    gpu.load_state(cpu.state())
    torch.testing.assert_close(run(gpu, 10).cpu(), run(cpu, 10).detach(), atol=1e-3, rtol=1e-3)
    assert gpu._graphs.recorded == 2


def test_a_loss_that_is_not_finite_is_named_by_its_update(buffer, tmp_path, monkeypatch):
    config = replace(CONFIG, rounds=20, log_every=10, checkpoint_every=5)
    update = Trainer.update

    def poisoned(self, domains):
        if self.round == 12:
            with torch.no_grad():
                self.model.predictor[0].weight.fill_(float("nan"))
        return update(self, domains)

    monkeypatch.setattr(Trainer, "update", poisoned)
    with pytest.raises(DivergenceError, match="was not from update 25 on, in round 15"):
        pretrain(config, buffer, RunDirectory(tmp_path), seed=0, device="cuda", progress=False)
    saved = RunDirectory(tmp_path).load_checkpoint("pretrain")
    assert saved["round"] == 10


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("batch", "size"), [(37, 84), (5, 64), (3, 21)])
def test_the_encoder_s_kernels_follow_its_layers(batch, size, norm):
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    encoder = Encoder(EncoderConfig(image_size=size, embedding_norm=norm)).to(device)
    encoder.to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (batch, 9, size, size), dtype=torch.uint8).to(device)
    direction = torch.randn(batch, 128).to(device)

    def found() -> dict[str, torch.Tensor]:
        return rounded_encoder.results(encoder, project_bytes(encoder, images), direction)

    first = found()
    if norm == "none":  # standardising noise makes of roundings what it likes
        rounded_encoder.assert_follows(encoder, first, images, direction)
    for again in (found() for _ in range(10)):
        assert all(torch.equal(again[name], first[name]) for name in first)
