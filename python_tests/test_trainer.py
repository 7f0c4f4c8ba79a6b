"""One update of pre-training against the same update written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor

from crpt.distributed import Team
from crpt.encoder import Encoder, EncoderConfig, initial_encoder
from crpt.objectives import build
from crpt.ops import conv_cpu, reference
from crpt.pretrain import Trainer
from crpt.pretrain.inputs import precision_on

# No number is a default: one that is written into the code instead of read shows.
CONFIG = replace(
    small.PRETRAIN,
    batch_size=12,
    learning_rate=2e-3,
    frame_stack=2,
    shift_pad=2,
    temperature=0.2,
    sinkhorn_iterations=2,
    target_rate=0.3,
    intrinsic_weight=0.5,
    intrinsic_offset=2.0,
    embedding_norm="none",
)
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data") / "dataset")


def test_initial_weights_are_the_seed_s_and_torch_s_own_state_stays(buffer, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(8)
        shape = EncoderConfig(
            in_channels=6, image_size=20, projection_dim=16, embedding_norm="none"
        )
        expected = build(initial_encoder(shape, 7), CONFIG).state_dict()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # what torch.manual_seed calls
    state = torch.random.get_rng_state()
    model = Trainer(CONFIG, buffer, seed=7, device=torch.device("cpu")).model
    assert torch.equal(torch.random.get_rng_state(), state)
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def project(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """g(f(pixels)) with the weights of an encoder's state."""
    h = pixels
    for i, stride in enumerate((2, 1, 1, 1)):
        layer = f"convolutions.{2 * i}"
        h = F.relu(F.conv2d(h, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride))
    return F.linear(h.flatten(1), weights["projector.weight"], weights["projector.bias"])


def predict(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = F.relu(F.linear(x, weights["predictor.0.weight"], weights["predictor.0.bias"]))
    return F.linear(hidden, weights["predictor.2.weight"], weights["predictor.2.bias"])


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def loss_by_hand(weights: dict[str, Tensor], obs: Tensor, next_obs: Tensor) -> Tensor:
    c, c_fixed = weights["prototypes"], weights["prototypes"].detach()
    s = F.normalize(predict(weights, project(part(weights, "online."), obs)), dim=-1)
    t = F.normalize(project(part(weights, "target."), next_obs), dim=-1).detach()
    codes = reference.sinkhorn(t @ c_fixed.T, 0.2, 2)
    comparison = -(codes * (s @ c.T / 0.2).log_softmax(-1)).sum(-1).mean()
    similarity = c_fixed @ c.T
    ratio = similarity / (similarity.detach() + 2.0)
    intrinsic = (ratio.sum() - ratio.diagonal().sum()) / len(c) ** 2
    return comparison + 0.5 * intrinsic


def test_updates_are_those_written_by_hand(buffer):
    trainer = Trainer(CONFIG, buffer, seed=3, device=torch.device("cpu"))
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items() if v.numel()}
    trained = [k for k in weights if not k.startswith("target.")]
    first = {k: torch.zeros_like(weights[k]) for k in trained}
    second = {k: torch.zeros_like(weights[k]) for k in trained}
    generator = torch.Generator().set_state(trainer.generator.get_state())
    options = {"frame_stack": 2, "pad": 2, "dtype": torch.float32, "generator": generator}

    # The second update is the first with an Adam that remembers and a target that lags.
    for step, domain in enumerate(("dot_blue", "dot_red"), start=1):
        losses = trainer.update((domain,))

        batch = buffer.sample(domain, 12, **options)
        weights["prototypes"] = F.normalize(weights["prototypes"], dim=-1)
        for k in trained:
            weights[k].requires_grad_()
        loss = loss_by_hand(weights, batch.obs, batch.next_obs)
        gradients = torch.autograd.grad(loss, [weights[k] for k in trained])
        for k, g in zip(trained, gradients, strict=True):
            first[k] = BETA_1 * first[k] + (1 - BETA_1) * g
            second[k] = BETA_2 * second[k] + (1 - BETA_2) * g**2
            m_hat = first[k] / (1 - BETA_1**step)
            v_hat = second[k] / (1 - BETA_2**step)
            weights[k] = weights[k].detach() - 2e-3 * m_hat / (v_hat.sqrt() + EPSILON)
        for k, online in part(weights, "online.").items():
            weights[f"target.{k}"] = 0.7 * weights[f"target.{k}"] + 0.3 * online

        torch.testing.assert_close(losses.total.detach(), loss.detach(), atol=1e-5, rtol=0)
        state = trainer.model.state_dict()
        for k, expected in weights.items():
            # On the mean: Adam divides a gradient by its own size, so where that is next to nothing
            # one weight may take a step of another sign. A wrong update is off by 1e-4 and more.
            assert (state[k] - expected).abs().mean() < 1e-6, (step, k)


@pytest.mark.parametrize("batches", ["alternate", "mixed"])
def test_a_process_of_a_team_makes_its_own_rows_of_the_batch_alone(buffer, monkeypatch, batches):
    config = replace(CONFIG, batches=batches)
    alone = Trainer(config, buffer, seed=3, device=torch.device("cpu"))
    made = []
    sample = buffer.sample

    def counted(*args, **options):
        batch = sample(*args, **options)
        made.append(len(batch.obs))
        return batch

    for rank in range(3):
        mine = Trainer(config, buffer, seed=3, device=torch.device("cpu"))
        mine.generator.set_state(alone.generator.get_state())
        mine.team = Team(rank, 3)
        monkeypatch.setattr(buffer, "sample", counted)
        found = [mine.sample(domains) for domains in mine.batches()]
        monkeypatch.undo()
        assert sum(made) == 4 * len(found)
        made.clear()
        before = alone.generator.get_state()
        for (obs, next_obs), domains in zip(found, alone.batches(), strict=True):
            whole_obs, whole_next_obs = alone.sample(domains)
            assert torch.equal(obs, whole_obs[4 * rank : 4 * rank + 4])
            assert torch.equal(next_obs, whole_next_obs[4 * rank : 4 * rank + 4])
        assert torch.equal(mine.generator.get_state(), alone.generator.get_state())
        alone.generator.set_state(before)


@pytest.mark.parametrize(
    ("precision", "device", "units", "expected"),
    [
        ("auto", "cpu", False, "fp32"),
        ("auto", "cpu", True, "bf16"),
        ("auto", "cuda", (9, 0), "bf16"),
        ("auto", "cuda", (7, 5), "fp32"),
        ("fp32", "cuda", (9, 0), "fp32"),
        ("fp32", "cpu", True, "fp32"),
        ("bf16", "cpu", False, "bf16"),
    ],
)
def test_auto_is_bf16_where_there_are_units_for_it(monkeypatch, precision, device, units, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: units)
    monkeypatch.setattr(conv_cpu, "available", lambda *asked: units)
    config = replace(CONFIG, precision=precision)
    assert precision_on(config, Encoder(), torch.device(device)) == expected


def test_auto_is_fp32_on_a_cpu_that_has_no_kernels_for_the_encoder(monkeypatch):
    monkeypatch.setattr(conv_cpu, "available", lambda *asked: True)
    encoder = Encoder(EncoderConfig(channels=16))
    assert precision_on(replace(CONFIG, precision="auto"), encoder, torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(("units", "expected"), [(False, "fp32"), (True, "bf16")])
def test_the_config_that_trains_says_which_precision_it_is(buffer, monkeypatch, units, expected):
    monkeypatch.setattr(conv_cpu, "available", lambda *asked: units)
    trainer = Trainer(replace(CONFIG, precision="auto"), buffer, seed=3, device=torch.device("cpu"))
    assert trainer.config.precision == expected
    assert trainer.sample(("dot_red",))[0].dtype == (torch.uint8 if units else torch.float32)


def test_a_run_that_goes_on_in_another_precision_is_told_of(buffer, caplog):
    cpu = torch.device("cpu")
    state = Trainer(replace(CONFIG, precision="bf16"), buffer, seed=3, device=cpu).state()
    Trainer(replace(CONFIG, precision="bf16"), buffer, seed=3, device=cpu).load_state(state)
    assert not caplog.text
    Trainer(replace(CONFIG, precision="fp32"), buffer, seed=3, device=cpu).load_state(state)
    assert "was pre-trained in bf16 until round 0 and goes on in fp32" in caplog.text
