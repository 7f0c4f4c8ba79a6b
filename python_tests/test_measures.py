import math

import pytest
import torch

import crpt.ops
from crpt import measures
from crpt.measures import (
    assignment_perplexity,
    effective_rank,
    effective_rank_of_gram,
    gram_matrix,
    prototype_spread,
    prototypes_in_use,
    temporal_retrieval,
    temporal_retrieval_of_gram,
    usage_entropy,
)


def test_effective_rank_of_isotropic_directions_is_their_number():
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:, :5]
    points = torch.cat([basis.T, -basis.T])  # centred, five equal singular values
    assert effective_rank(points) == pytest.approx(5.0, abs=1e-6)


def test_rounding_adds_nothing_to_the_effective_rank_of_many_dimensions():
    basis = torch.linalg.qr(torch.randn(512, 512, dtype=torch.float64)).Q[:, :5]
    points = torch.cat([basis.T, -basis.T]).repeat(50, 1)
    assert effective_rank(points) == pytest.approx(5.0, abs=1e-9)


def test_effective_rank_ignores_a_common_offset():
    x = torch.randn(200, 8, dtype=torch.float64)
    assert effective_rank(x + 5) == pytest.approx(effective_rank(x), rel=1e-6)


def test_effective_rank_of_a_line_is_one_and_of_a_point_zero():
    line = torch.linspace(-1, 1, 50)[:, None] * torch.randn(1, 6)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.randn(1, 6).expand(50, 6)) == 0.0


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_effective_rank_of_what_is_not_finite_is_not_a_number(shape, value):
    x = torch.randn(shape)
    x[1, 2] = value
    assert math.isnan(effective_rank(x))


def test_effective_rank_of_more_dimensions_than_rows():
    x = torch.randn(30, 200, dtype=torch.float64)
    sigma = torch.linalg.svdvals(x - x.mean(0))
    p = sigma / sigma.sum()
    assert effective_rank(x) == pytest.approx(float((-p * p.log()).nansum().exp()), rel=1e-5)


@pytest.mark.parametrize("sizes", [(7, 11), (1024, 2048)])
def test_gram_matrix_is_the_product_in_float64(monkeypatch, sizes):
    monkeypatch.setattr(measures, "_BLOCK", sizes[0])
    monkeypatch.setattr(measures, "_COLUMNS", sizes[1])
    x = 3 + torch.randn(20, 60)
    x[:, ::3] = torch.randn(20)  # those that are one number in all rows
    for embeddings in (x, x.bfloat16(), x[:1], x[:, :0]):
        got, exact = gram_matrix(embeddings), embeddings.double()
        assert torch.equal(got, got.T)
        torch.testing.assert_close(got, exact @ exact.T, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 5.0, 1e4])
@pytest.mark.parametrize("shape", [(40, 8), (40, 200)])
def test_effective_rank_of_gram_is_that_of_the_embeddings(shape, offset):
    x = offset + torch.randn(shape, dtype=torch.float64) * 0.9 ** torch.arange(shape[1])
    assert effective_rank_of_gram(gram_matrix(x)) == pytest.approx(effective_rank(x), rel=1e-4)


def test_effective_rank_of_gram_of_what_has_none():
    assert effective_rank_of_gram(gram_matrix(torch.zeros(50, 200))) == 0.0
    almost_equal = torch.randn(1, 200) * (1 + 1e-7 * torch.randn(50, 200))
    assert effective_rank_of_gram(gram_matrix(almost_equal)) == 0.0
    assert math.isnan(effective_rank_of_gram(gram_matrix(torch.full((5, 9), math.inf))))


def test_prototypes_in_use_counts_first_choices():
    codes = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    assert prototypes_in_use(codes) == 2


def test_perplexity_of_certain_and_uniform_codes():
    assert assignment_perplexity(torch.eye(7)) == pytest.approx(1.0)
    assert assignment_perplexity(torch.full((4, 7), 1 / 7)) == pytest.approx(7.0, rel=1e-6)
    assert math.isfinite(assignment_perplexity(torch.zeros(2, 3)))


def test_usage_entropy_is_that_of_the_prototypes_shares():
    assert usage_entropy(torch.eye(7)) == pytest.approx(math.log(7))
    assert usage_entropy(torch.eye(7)[:1].expand(5, 7)) == pytest.approx(0.0)


def prototypes(m=512, d=128):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=-1)


def one_point(c):
    return c[:1].expand(len(c), -1)


def near_one_point(c):
    noise = torch.randn(c.shape, generator=torch.Generator().manual_seed(1))
    return c[:1] + 1e-3 * noise


def two_points(c):
    return c[:2].repeat(len(c) // 2, 1)


def healthy(c):
    return torch.randn(c.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("embeddings", "used", "entropy"),
    [
        (one_point, (1, 1), (0.0, 0.0)),
        (near_one_point, (1, 1), (0.0, 0.0)),
        (two_points, (2, 2), (math.log(2), math.log(2))),
        (healthy, (250, 400), (5.3, math.log(512))),
    ],
)
def test_use_is_told_by_similarities_where_codes_are_balanced(embeddings, used, entropy):
    c = prototypes()
    scores = crpt.ops.prototype_similarity(embeddings(c).contiguous(), c)
    codes = crpt.ops.sinkhorn(scores, 0.1, 3)
    # Sinkhorn uses all alike, so that its codes tell nothing.
    shares = codes.mean(dim=0)
    assert float(torch.special.entr(shares).sum()) == pytest.approx(math.log(512), abs=0.01)
    assert used[0] <= prototypes_in_use(scores) <= used[1]
    assert entropy[0] - 1e-9 <= usage_entropy(scores) <= entropy[1] + 1e-9


def test_prototype_spread_of_orthogonal_and_doubled_prototypes():
    assert prototype_spread(3 * torch.eye(5)) == pytest.approx((0.0, 0.0))
    mean, largest = prototype_spread(torch.cat([torch.eye(5), torch.eye(5)]))
    assert largest == pytest.approx(1.0)
    assert mean == pytest.approx(10 / 90)


def brute_force_retrieval(x, episode, apart, window):
    found = chance = queries = 0
    for i in range(len(x)):
        keys = [j for j in range(len(x)) if not (episode[i] == episode[j] and abs(i - j) < apart)]
        wanted = [j for j in keys if episode[i] == episode[j] and abs(i - j) <= window]
        if wanted:
            queries += 1
            chance += len(wanted) / len(keys)
            found += min(keys, key=lambda j: float((x[i] - x[j]).norm())) in wanted
    return found / queries, chance / queries


@pytest.mark.parametrize("block", [7, 1024])
def test_temporal_retrieval_is_the_definition(monkeypatch, block):
    monkeypatch.setattr(measures, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    episode = torch.arange(6).repeat_interleave(torch.tensor([9, 1, 12, 3, 20, 8]))
    x = torch.randn(len(episode), 4, generator=generator, dtype=torch.float64)
    x = x.cumsum(0) * 0.3  # near in time is near in space
    for apart, window in ((3, 10), (1, 2), (4, 4)):
        expected = brute_force_retrieval(x, episode, apart, window)
        got = temporal_retrieval(x, episode, apart=apart, window=window)
        assert got == pytest.approx(expected)
        gram = gram_matrix(x)
        assert temporal_retrieval_of_gram(gram, episode, apart=apart, window=window) == got


def test_temporal_retrieval_tells_embeddings_apart_that_are_all_but_equal():
    """As those of a task that an encoder knows little of: unit length, one direction."""
    generator = torch.Generator().manual_seed(0)
    episode = torch.arange(10).repeat_interleave(20)
    walk = torch.randn(len(episode), 16, generator=generator, dtype=torch.float64).cumsum(0)
    x = (1 + 1e-5 * walk).float()
    expected = brute_force_retrieval(x.double(), episode, 3, 10)
    assert temporal_retrieval(x, episode) == pytest.approx(expected)
    assert temporal_retrieval_of_gram(gram_matrix(x), episode) == pytest.approx(expected)


def test_temporal_retrieval_without_neighbours_is_nan():
    assert all(math.isnan(v) for v in temporal_retrieval(torch.randn(4, 2), torch.arange(4)))
