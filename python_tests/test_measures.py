import math

import pytest
import torch

from crpt.measures import assignment_perplexity, effective_rank, prototypes_in_use


def test_effective_rank_of_isotropic_directions_is_their_number():
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:, :5]
    points = torch.cat([basis.T, -basis.T])  # centred, five equal singular values
    assert effective_rank(points) == pytest.approx(5.0, abs=1e-6)


def test_effective_rank_ignores_a_common_offset():
    x = torch.randn(200, 8, dtype=torch.float64)
    assert effective_rank(x + 5) == pytest.approx(effective_rank(x), rel=1e-6)


def test_effective_rank_of_a_line_is_one_and_of_a_point_zero():
    line = torch.linspace(-1, 1, 50)[:, None] * torch.randn(1, 6)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.randn(1, 6).expand(50, 6)) == 0.0


def test_prototypes_in_use_counts_first_choices():
    codes = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]])
    assert prototypes_in_use(codes) == 2


def test_perplexity_of_certain_and_uniform_codes():
    assert assignment_perplexity(torch.eye(7)) == pytest.approx(1.0)
    assert assignment_perplexity(torch.full((4, 7), 1 / 7)) == pytest.approx(7.0, rel=1e-6)
    assert math.isfinite(assignment_perplexity(torch.zeros(2, 3)))
