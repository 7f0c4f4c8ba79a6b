"""Whose turn it is, and whose rows a batch has, by the weights of the domains."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import small

from crpt.config.weights import in_lowest_terms
from crpt.pretrain.feeds import parts
from crpt.pretrain.turns import Turns, smooth_round_robin


def turns(weights, names="abc", batches="alternate", **changes):
    config = replace(
        small.PRETRAIN, domains=tuple(names), weights=weights, batches=batches, **changes
    )
    return Turns(config, ())


def order(turns, rounds):
    return [d for r in range(rounds) for d in turns.of_round(r)]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 3), (1, 3)), ((0.1, 0.3), (1, 3)), ((1, 1.5), (2, 3)), ((4.0, 4.0), (1, 1)),
        ((1e-3, 2.0, 0.5), (1, 2000, 500)), ((7,), (1,)),
    ],
)  # fmt: skip
def test_weights_are_taken_as_written(weights, expected):
    assert in_lowest_terms(weights) == expected


@pytest.mark.parametrize("weights", [(), (1.0, 1.0, 1.0), (0.1, 0.1, 0.1), (5, 5, 5)])
def test_equal_weights_take_turns_in_order(weights):
    assert order(turns(weights), 4) == [("a",), ("b",), ("c",)] * 4


def test_weights_go_with_their_domains_whatever_the_order():
    assert turns((1, 2, 4), names="cab").weights == (2, 4, 1)
    assert turns((1, 2, 4), names="cab").names == ("a", "b", "c")
    assert turns((1, 2, 4), names="aba").weight_of("a") == 5


@pytest.mark.parametrize("weights", [(1, 2, 1), (1, 1.5, 0.7), (1, 10, 3), (0.31, 0.007, 2.1)])
def test_turns_follow_the_weights_all_along(weights):
    exact = in_lowest_terms(weights)
    had = Counter()
    for t, i in enumerate(itertools.islice(smooth_round_robin(exact), 3 * sum(exact)), start=1):
        had[i] += 1
        assert had[i] - t * exact[i] / sum(exact) < 1
    assert [had[i] for i in range(3)] == [3 * w for w in exact]


def test_a_round_has_as_many_updates_as_domains_whatever_the_weights():
    weighted = turns((1, 2, 1))
    expected = [("b",), ("a",), ("c",), ("b",)] * 6
    assert order(weighted, 8) == expected
    assert all(len(weighted.of_round(r)) == 3 for r in range(8))
    assert turns((1, 2, 1)).of_round(5) == expected[15:18]  # a run that goes on there
    assert list(itertools.islice(weighted.after(7), 9)) == expected[7:16]


@pytest.mark.parametrize("weights", [(1, 2, 1), (1, 1.5, 0.7), (3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("batch", [5, 16, 97, 512])
def test_shares_of_a_mixed_batch_are_within_one_row_of_their_weights(weights, batch):
    mixed = turns(weights, batches="mixed", batch_size=batch)
    found = parts(mixed.names, batch, mixed.shares)
    assert found[0].begin == 0
    assert found[-1].end == batch
    for part, weight in zip(found, weights, strict=True):
        rows = part.end - part.begin
        assert rows >= 1
        assert abs(rows - batch * weight / sum(weights)) < 1
    assert mixed.of_round(3) == [("a", "b", "c")] * 3


def test_equal_weights_have_the_shares_of_none():
    for batch in range(3, 40):
        equal = turns((2, 2, 2), batches="mixed", batch_size=batch)
        assert parts(equal.names, batch, equal.shares) == parts(equal.names, batch)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ((1, 2), ValueError, "one number for each of domains, .* got 2 weights and 3 domains"),
        ((1, 0, 1), ValueError, r"weights should be finite and greater than 0, got \[1, 0, 1\]"),
        ((1, -2.0, 1), ValueError, "weights should be finite and greater than 0"),
        ((1, math.nan, 1), ValueError, "weights should be finite and greater than 0, got .*nan"),
        ((1, math.inf, 1), ValueError, "weights should be finite and greater than 0, got .*inf"),
        ((1, "2", 1), TypeError, r"weights should be a tuple of float, got \(1, '2', 1\)"),
        ((1, True, 1), TypeError, r"weights should be a tuple of float, got \(1, True, 1\)"),
        ((1, 1e-3, 1), ValueError, r"at least one turn, of which there are 18, .* b has 0\.009"),
    ],
)
def test_weights_that_cannot_be_followed_are_named(weights, error, message):
    with pytest.raises(error, match=message):
        turns(weights)


def test_a_mixed_batch_has_a_row_for_every_domain():
    message = r"at least one row of a mixed batch, of which there are 16, got .* c has 0\.8"
    with pytest.raises(ValueError, match=message):
        turns((10, 9, 1), batches="mixed")
    turns((7, 8, 1), batches="mixed")


def test_weights_want_their_domains_named():
    with pytest.raises(ValueError, match="got 2 weights and 0 domains; name the domains, too"):
        replace(small.PRETRAIN, weights=(1, 2))
