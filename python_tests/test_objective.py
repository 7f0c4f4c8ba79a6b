import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small import PRETRAIN, new_encoder, views

from crpt.objectives.crptpro import CRPTPro
from crpt.ops import reference


def make(**changes) -> CRPTPro:
    config = replace(PRETRAIN, **changes)
    return CRPTPro(new_encoder(config), config)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_loss_is_the_formula(norm):
    model = make(embedding_norm=norm)
    model.before_update()
    obs, next_obs = views()

    def embed(encoder, x):
        g = encoder.projector(encoder.convolutions(x).flatten(1))
        if norm == "batch":
            g = (g - g.mean(0)) / (g.var(0, unbiased=False) + 1e-5).sqrt()
        return g

    c = model.prototypes.detach()
    s_hat = F.normalize(model.predictor(embed(model.online, obs)), dim=-1)
    t_hat = F.normalize(embed(model.target, next_obs), dim=-1)
    q = reference.sinkhorn(t_hat @ c.T, 0.1, 3)
    comparison = -(q * (s_hat @ c.T / 0.1).log_softmax(-1)).sum(-1).mean()
    s = c @ c.T
    m = len(c)
    off = s / (s + 1.5)
    intrinsic = (off.sum() - off.diagonal().sum()) / m**2

    losses = model(obs, next_obs)
    torch.testing.assert_close(
        losses.parts["comparison_loss"], comparison.detach(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(losses.parts["intrinsic_loss"], intrinsic, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(losses.total, comparison + 0.005 * intrinsic, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.codes, q, atol=1e-5, rtol=1e-4)


def test_gradients_of_the_prototypes_are_those_of_the_plain_product():
    model = make(intrinsic="none")
    model.before_update()
    obs, next_obs = views()
    losses = model(obs, next_obs)
    losses.total.backward()
    c = model.prototypes.detach().clone().requires_grad_()
    with torch.no_grad():
        s_hat = F.normalize(
            model.predictor(model.online.project(model.online.features(obs))), dim=-1
        )
    q = losses.codes
    (-(q * (s_hat @ c.T / 0.1).log_softmax(-1)).sum(-1).mean()).backward()
    torch.testing.assert_close(model.prototypes.grad, c.grad, atol=1e-5, rtol=1e-4)


def test_no_gradient_reaches_the_target_and_every_other_parameter_has_one():
    model = make()
    model.before_update()
    model(*views()).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.target.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p is model.prototypes for p in trained)


def test_the_target_follows_at_its_rate():
    model = make(target_rate=0.05)
    before = [p.clone() for p in model.target.parameters()]
    with torch.no_grad():
        for p in model.online.parameters():
            p.add_(1.0)
    model.after_update()
    for old, new, online in zip(
        before, model.target.parameters(), model.online.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.95 * old + 0.05 * online)


def test_prototypes_are_projected_to_unit_length():
    model = make()
    with torch.no_grad():
        model.prototypes.mul_(3.0)
    model.before_update()
    torch.testing.assert_close(model.prototypes.norm(dim=-1), torch.ones(32))


def test_ablations_of_the_intrinsic_loss():
    model = make(intrinsic="none")
    assert model.ablated_intrinsic_loss().item() == 0.0
    model = make(intrinsic="knn")
    model.before_update()
    c = model.prototypes
    expected = (c.detach() @ c.T).sort(dim=-1, descending=True).values[:, 2].mean()
    torch.testing.assert_close(model.ablated_intrinsic_loss(), expected)


def test_export_is_a_copy_with_the_prototypes():
    model = make()
    encoder = model.export()
    assert len(encoder.prototypes) == 32
    assert len(model.online.prototypes) == 0
    with torch.no_grad():
        model.online.projector.weight.zero_()
    assert encoder.projector.weight.any()


def test_uniform_codes_are_the_trivial_solution():
    # Equal frames give equal scores, uniform codes, and a loss of at least log M.
    model = make(embedding_norm="none")
    model.before_update()
    same = torch.full((16, 9, 20, 20), 0.5)
    losses = model(same, same)
    torch.testing.assert_close(losses.codes, torch.full((16, 32), 1 / 32), atol=1e-5, rtol=1e-3)
    assert losses.parts["comparison_loss"].item() >= math.log(32) - 1e-4
