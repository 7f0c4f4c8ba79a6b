"""The comparators of the paper's objective, against their formulas written out."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import small
import torch
import torch.nn.functional as F
from small import PRETRAIN, new_encoder, views

from crpt import config
from crpt.encoder import Encoder, EncoderConfig
from crpt.objectives import OBJECTIVES, build
from crpt.objectives.autoencoder import Decoder
from crpt.objectives.base import Losses, Objective, TargetObjective
from crpt.objectives.byol import BYOL
from crpt.pretrain import pretrain
from crpt.run_directory import RunDirectory
from crpt.train import _require_that_stages_fit

COMPARATORS = sorted(set(OBJECTIVES) - {"crptpro"})


def make(objective: str, **changes) -> Objective:
    config = replace(PRETRAIN, objective=objective, **changes)
    return build(new_encoder(config), config)


def embed(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
    g = encoder.projector(encoder.convolutions(x).flatten(1))
    return (g - g.mean(0)) / (g.var(0, unbiased=False) + 1e-5).sqrt()


def test_the_config_names_them_all():
    assert get_args(config.Objective) == tuple(OBJECTIVES)


def test_atc_is_the_formula():
    model = make("atc")
    with torch.no_grad():
        model.contrast.add_(0.1 * torch.randn_like(model.contrast))
    obs, next_obs = views()
    a, c = embed(model.online, obs), embed(model.target, next_obs).detach()
    p = a + model.predictor(a)
    expected = torch.stack(
        [
            -(p[b] @ model.contrast @ c[b])
            + torch.logsumexp(torch.stack([p[b] @ model.contrast @ other for other in c]), 0)
            for b in range(len(c))
        ]
    ).mean()
    losses = model(obs, next_obs)
    torch.testing.assert_close(losses.total, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses.distance, math.log(16) - expected.detach(), atol=1e-4, rtol=0)


def test_byol_is_the_formula():
    model = make("byol")
    obs, next_obs = views()
    s, t = model.predictor(embed(model.online, obs)), embed(model.target, next_obs).detach()
    cosine = torch.stack([s[b] @ t[b] / (s[b].norm() * t[b].norm()) for b in range(len(s))])
    losses = model(obs, next_obs)
    torch.testing.assert_close(losses.total, (2 - 2 * cosine).mean(), atol=1e-5, rtol=1e-5)


def test_no_constant_prediction_is_better_than_byols_trivial_solution():
    model = make("byol")
    losses = model(*views())
    trivial = losses.distance + losses.parts["prediction_loss"]
    directions = F.normalize(torch.randn(500, losses.z.shape[1]), dim=-1)
    constant = (2 - 2 * directions @ losses.z.T).mean(dim=1)
    assert constant.min() >= trivial - 1e-5
    best = F.normalize(losses.z.mean(0), dim=0)
    torch.testing.assert_close((2 - 2 * losses.z @ best).mean(), trivial, atol=1e-5, rtol=1e-5)


def test_the_autoencoder_is_the_formula():
    model = make("autoencoder")
    with torch.no_grad():
        model.decoder.linear.weight.mul_(30)  # at init it draws nearly the same for every z
    obs, next_obs = views()
    z = F.normalize(embed(model.online, obs), dim=-1)
    losses = model(obs, next_obs)
    torch.testing.assert_close(losses.total, ((model.decoder(z) - obs) ** 2).mean())
    mean_image = obs.mean(0, keepdim=True)
    trivial = ((mean_image - obs) ** 2).mean()
    torch.testing.assert_close(losses.distance, 1 - losses.total.detach() / trivial)


@pytest.mark.parametrize("size", [20, 21, 33, 84])
def test_the_decoder_returns_to_the_size_of_the_image(size):
    config = EncoderConfig(image_size=size, strides=(2, 1, 2, 1) if size > 30 else (2, 1, 1, 1))
    assert Decoder(config)(torch.randn(2, 128)).shape == (2, 9, size, size)


@pytest.mark.parametrize("name", COMPARATORS)
def test_every_trained_parameter_has_a_gradient_and_the_target_none(name):
    model = make(name)
    losses = model(*views())
    losses.total.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    if isinstance(model, TargetObjective):
        assert not any(p.requires_grad for p in model.target.parameters())
    assert not losses.z.requires_grad
    assert not losses.distance.requires_grad
    torch.testing.assert_close(losses.z.norm(dim=-1), torch.ones(16))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_loss_falls_below_the_trivial_one_on_a_batch_seen_often(name):
    model = make(name)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    blocks = torch.rand(8, 9, 4, 4, generator=torch.Generator().manual_seed(1))
    obs = blocks.repeat_interleave(5, 2).repeat_interleave(5, 3)
    next_obs = (obs + 0.01).clamp(max=1)

    def update() -> Losses:
        model.before_update()
        losses: Losses = model(obs, next_obs)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        model.after_update()
        return losses

    first = update()
    for _ in range(400):
        last = update()
    assert last.total < first.total
    assert last.distance > max(0.01, first.distance)


@pytest.mark.parametrize("name", COMPARATORS)
def test_the_export_is_a_copy(name):
    model = make(name)
    encoder = model.export()
    with torch.no_grad():
        model.online.projector.weight.zero_()
    assert encoder.projector.weight.any()
    assert len(encoder.prototypes) == 0


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_bf16_is_near_fp32(name):
    losses = {}
    for precision in ("fp32", "bf16"):
        model = make(name, precision=precision)
        model.before_update()
        losses[precision] = model(*views()).total
    assert losses["bf16"].dtype == torch.float32
    torch.testing.assert_close(losses["bf16"], losses["fp32"], atol=0.05, rtol=0.05)


class WithPrototypes(BYOL):
    """An objective of one's own, whose prototypes are no parameter."""

    has_prototypes = True

    def __init__(self, encoder: Encoder, config: config.PretrainConfig) -> None:
        super().__init__(encoder, config)
        prototypes = F.normalize(torch.randn(config.prototypes, config.projection_dim), dim=-1)
        self.register_buffer("prototypes", prototypes)


def test_prototypes_of_another_objective_are_logged_exported_and_rewarded(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "byol", WithPrototypes)
    config = replace(PRETRAIN, objective="byol", rounds=2)
    run = RunDirectory(tmp_path / "run")
    buffer = small.dataset(tmp_path / "dataset")
    encoder = pretrain(config, buffer, run, seed=0, progress=False)
    assert encoder.prototypes.shape == (32, 16)
    for line in run.metrics("pretrain"):
        assert abs(line["prototype_similarity_mean"]) < 0.1
        assert 0.3 < line["prototype_similarity_max"] < 1
    assert small.STAGES.finetune.intrinsic_reward > 0
    _require_that_stages_fit(replace(small.STAGES, pretrain=config))
