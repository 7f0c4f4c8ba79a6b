import pytest
import torch
import torch.nn.functional as F

from crpt.agents import IntrinsicReward


def unit(n: int, d: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_reward_is_the_distance_to_the_third_nearest_in_the_queue():
    reward = IntrinsicReward(unit(9, seed=1), queue_size=12, seed=0)
    z = unit(200)
    r = reward(z)
    queue = reward.queue[: reward.filled]
    assert len(queue) == 9
    nearest = torch.cdist(z, queue).sort(dim=-1).values
    torch.testing.assert_close(r, nearest[:, 2])
    assert (nearest[:, [1, 3]] - nearest[:, [2]]).abs().min(dim=0).values.gt(0).all()  # no other's


def test_the_queue_holds_members_of_the_batches_first_in_first_out():
    reward = IntrinsicReward(unit(5, seed=1), queue_size=12, seed=0)
    batches = [unit(7, seed=10 + i) for i in range(4)]
    for i, z in enumerate(batches):
        reward(z)
        assert reward.filled == min(5 * (i + 1), 12)
    # 20 pushed, 12 kept: the latest, of which 10 are of the last two batches.
    recent = torch.cat(batches[-2:])
    member = (torch.cdist(reward.queue, recent) < 1e-6).any(dim=-1)
    assert member.sum() == 10


def test_a_prototype_draws_what_is_similar_to_it():
    # One prototype, scores 1 and -1: probability e / (e + 1/e) = 0.88 for the similar one.
    c = unit(3)
    z = torch.cat([c[:1], -c[:1]])
    hits = 0
    reward = IntrinsicReward(c[:1].expand(3, -1).contiguous(), queue_size=3, seed=0)
    for _ in range(300):
        reward(z)
        hits += int((reward.queue @ c[0] > 0).sum())
    assert hits / 900 == pytest.approx(0.88, abs=0.05)


def test_state_round_trip():
    first = IntrinsicReward(unit(5, seed=1), queue_size=12, seed=0)
    first(unit(7))
    second = IntrinsicReward(unit(5, seed=1), queue_size=12, seed=5)
    second.load_state(first.state())
    assert torch.equal(first(unit(7, seed=3)), second(unit(7, seed=3)))


@pytest.mark.parametrize(("prototypes", "queue"), [(5, 4), (2, 12)])
def test_sizes_that_cannot_work(prototypes, queue):
    with pytest.raises(ValueError, match="queue_size should be at least"):
        IntrinsicReward(unit(prototypes), queue_size=queue, seed=0)
