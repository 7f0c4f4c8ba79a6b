import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from crpt.agents import SAC, FeatureBatch
from crpt.agents.features import FeatureExtractor
from crpt.agents.networks import Actor, Critic
from crpt.agents.policy import mean_action
from crpt.config import FinetuneConfig
from crpt.encoder import EncoderConfig, initial_encoder

CONFIG = FinetuneConfig(hidden_dim=32, trunk_dim=8, learning_rate=1e-3, batch_size=16)
CPU = torch.device("cpu")


def agent(seed: int = 0, **changes) -> SAC:
    return SAC(6, 2, replace(CONFIG, **changes), seed=seed, device=CPU)


def batch(n: int = 16, seed: int = 0, **changes) -> FeatureBatch:
    g = torch.Generator().manual_seed(seed)
    fields = {
        "features": torch.randn(n, 6, generator=g),
        "action": torch.rand(n, 2, generator=g) * 2 - 1,
        "reward": torch.randn(n, generator=g),
        "discount": torch.ones(n),
        "next_features": torch.randn(n, 6, generator=g),
    }
    return FeatureBatch(**fields | changes)


def test_log_prob_is_that_of_the_squashed_gaussian():
    actor = Actor(6, 2, 8, 32).double()
    features = torch.randn(64, 6, dtype=torch.float64)
    action, log_prob = actor.sample(features, torch.Generator().manual_seed(0))
    assert (action.abs() <= 1).all()
    mu, log_std = actor(features)
    inner = action.abs().amax(-1) < 0.999  # where atanh of the action is exact enough
    assert inner.sum() > 10
    expected = TransformedDistribution(
        Independent(Normal(mu, log_std.exp()), 1), [TanhTransform()]
    ).log_prob(action)
    torch.testing.assert_close(log_prob[inner], expected[inner], atol=1e-5, rtol=1e-5)
    assert log_prob.isfinite().all()


def test_log_std_stays_in_its_range():
    actor = Actor(6, 2, 8, 32)
    _, log_std = actor(1e6 * torch.randn(100, 6))
    assert (log_std >= -10).all()
    assert (log_std <= 2).all()


def test_twin_critics_share_the_first_layer_and_differ():
    critic = Critic(6, 2, 8, 32)
    q1, q2 = critic(torch.randn(5, 6), torch.rand(5, 2))
    assert q1.shape == q2.shape == (5,)
    assert not torch.equal(q1, q2)
    assert len([m for m in critic.modules() if isinstance(m, torch.nn.LayerNorm)]) == 1


def test_the_critic_regresses_on_the_soft_bellman_target():
    sac, b = agent(), batch()
    before = copy.deepcopy(sac)
    metrics = sac.update(b)
    with torch.no_grad():
        next_action, log_prob = before.actor.sample(b.next_features, before.generator)
        q_next = torch.minimum(*before.target_critic(b.next_features, next_action))
        target = b.reward + 0.99 * (q_next - 0.1 * log_prob)
        q1, q2 = before.critic(b.features, b.action)
        expected = ((q1 - target) ** 2 + (q2 - target) ** 2).mean()
    torch.testing.assert_close(metrics["critic_loss"], expected, rtol=1e-4, atol=1e-5)


def test_a_terminated_transition_does_not_bootstrap():
    b = batch(discount=torch.zeros(16))
    elsewhere = replace(b, next_features=100 * torch.randn(16, 6))
    a, c = agent(), agent()
    torch.testing.assert_close(a.update(b)["critic_loss"], c.update(elsewhere)["critic_loss"])


def test_actor_temperature_and_target_keep_their_own_pace():
    sac = agent(actor_every=2, target_every=3)

    def snapshot():
        return (
            sac.actor.policy[0].weight.clone(),
            sac.log_alpha.clone().detach(),
            sac.target_critic.q1[0].weight.clone(),
        )

    moved = []
    for step in range(6):
        old = snapshot()
        sac.update(batch(seed=step))
        moved.append([not torch.equal(x, y) for x, y in zip(old, snapshot(), strict=True)])
    assert moved == [
        [True, True, True],
        [False, False, False],
        [True, True, False],
        [False, False, True],
        [True, True, False],
        [False, False, False],
    ]


def test_the_target_critic_follows_at_its_rate():
    sac = agent(target_rate=0.3, target_every=1)
    for step in range(3):
        old = [p.clone() for p in sac.target_critic.parameters()]
        sac.update(batch(seed=step))
        triples = zip(old, sac.critic.parameters(), sac.target_critic.parameters(), strict=True)
        for before, critic, after in triples:
            torch.testing.assert_close(after, 0.7 * before + 0.3 * critic, rtol=0, atol=2e-7)


def test_the_checkpointed_generator_is_of_the_cpu_on_any_device():
    # The device without memory stands for all that are not the CPU.
    device = torch.device("meta")
    sac = SAC(6, 2, CONFIG, seed=0, device=device)
    sac.generator.set_state(agent().state()["generator"])
    assert sac.act(torch.zeros(6, device=device), explore=True).device == device


def test_the_actor_s_loss_leaves_no_gradient_in_the_critic():
    sac = agent(actor_every=1)
    sac.update(batch())
    grads = [p.grad.clone() for p in sac.critic.parameters()]
    sac._update_actor_and_temperature(batch().features)
    after = [p.grad for p in sac.critic.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))
    assert all(p.requires_grad for p in sac.critic.parameters())


def test_the_temperature_moves_towards_the_target_entropy():
    sac = agent()
    start = sac.log_alpha.item()
    assert math.exp(start) == pytest.approx(0.1)
    sac.target_entropy = 1e3  # far above any policy's
    sac.update(batch())
    assert sac.log_alpha.item() > start
    sac = agent()
    sac.target_entropy = -1e3
    sac.update(batch())
    assert sac.log_alpha.item() < start


def test_it_solves_a_bandit():
    # Reward -|a - a*|^2 and episodes of one step: the mean action must find a*.
    best = torch.tensor([0.5, -0.3])
    sac = agent(learning_rate=3e-3, actor_every=1, discount=0.0)
    features = torch.ones(16, 6)
    for step in range(400):
        b = batch(seed=step, features=features, next_features=features)
        sac.update(replace(b, reward=-((b.action - best) ** 2).sum(-1), discount=torch.zeros(16)))
    found = sac.act(features[0], explore=False)
    torch.testing.assert_close(found, best, atol=0.15, rtol=0)


@pytest.mark.parametrize("kind", ["h", "z"])
def test_the_policy_is_the_squashed_mean(kind):
    encoder = initial_encoder(EncoderConfig(image_size=20, projection_dim=16), seed=0)
    extractor = FeatureExtractor(encoder, kind, CPU)
    actor = Actor(extractor.dim, 2, 8, 32)
    with torch.no_grad():
        actor.policy[-1].bias.fill_(1.5)  # where tanh(x) is not x
        obs = torch.randint(0, 256, (9, 20, 20), dtype=torch.uint8)
        mu, _ = actor(extractor.view(extractor(obs[None])))
    action = mean_action(actor, extractor)(obs.numpy())
    assert (abs(action) < 1).all()
    torch.testing.assert_close(torch.from_numpy(action), torch.tanh(mu[0]))


def test_state_round_trip_continues_bit_for_bit(tmp_path):
    sac = agent()
    for step in range(3):
        sac.update(batch(seed=step))
    torch.save(sac.state(), tmp_path / "sac.pt")
    other = agent(seed=9)
    other.load_state(torch.load(tmp_path / "sac.pt", weights_only=True))
    for step in range(3, 6):
        a, b = sac.update(batch(seed=step)), other.update(batch(seed=step))
        assert all(torch.equal(a[k], b[k]) for k in a)
    f = torch.randn(6)
    assert torch.equal(sac.act(f, explore=True), other.act(f, explore=True))


def test_same_seed_same_agent_and_torch_s_own_state_untouched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # what torch.manual_seed calls
    state = torch.random.get_rng_state()
    a, b = agent(3), agent(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.actor.trunk[0].weight, b.actor.trunk[0].weight)
