"""The operators behind the gradients are public in torch.ops.crpt: they, too, refuse what would
make a kernel read or write outside its tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import crpt.ops  # noqa: F401  registers the operators

ONE, TWO, HALF = torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 4).half()
INDEX = torch.zeros(3, dtype=torch.int64)

WRONG: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("prototype_similarity_backward", (torch.ones(3, 2), HALF, torch.ones(3), TWO), TypeError, "unit should be float32 or float64, got torch.float16"),
    ("prototype_similarity_backward", (torch.ones(3, 2), torch.ones(4), torch.ones(3), TWO), ValueError, r"unit should be \[..., R, D\] with D >= 1, got \[4\]"),
    ("prototype_similarity_backward", (torch.ones(3, 2), ONE, torch.ones(2), TWO), ValueError, r"norm should be \[3\], got \[2\]"),
    ("prototype_similarity_backward", (torch.ones(3, 2), ONE, torch.ones(3).double(), TWO), TypeError, "norm should be torch.float32, got torch.float64"),
    ("prototype_similarity_backward", (torch.ones(3, 2), ONE, torch.ones(3), TWO.double()), TypeError, "other should be torch.float32 like unit"),
    ("prototype_similarity_backward", (torch.ones(3, 2), ONE, torch.ones(3), torch.ones(2, 5)), ValueError, r"other should be \[..., S, 4\], got \[2, 5\]"),
    ("prototype_similarity_backward", (torch.ones(3, 2), torch.ones(5, 3, 4), torch.ones(5, 3), torch.ones(6, 2, 4)), ValueError, r"broadcast with \[5\], got \[6\]"),
    ("prototype_similarity_backward", (torch.ones(2, 2), ONE, torch.ones(3), TWO), ValueError, r"grad should be \[3, 2\], got \[2, 2\]"),
    ("prototype_similarity_backward", (torch.ones(3, 2).int(), ONE, torch.ones(3), TWO), TypeError, "grad should be float32"),
    ("prototype_loss_backward", (torch.ones(()), ONE, ONE, torch.ones(2, 2)), ValueError, r"codes should be \[3, 4\] like scores, got \[2, 2\]"),
    ("prototype_loss_backward", (torch.ones(3), ONE, ONE, ONE), ValueError, r"grad should be \[\], got \[3\]"),
    ("prototype_loss_backward", (torch.ones(()), torch.ones(0), ONE, ONE), ValueError, r"grad_scores should be \[3, 4\], got \[0\]"),
    ("prototype_loss_backward", (torch.ones(()).half(), HALF, HALF, HALF), TypeError, "grad_scores should be torch.float32, got torch.float16"),
    ("prototype_loss_backward_scores", (torch.ones(3), torch.ones(4, 4), torch.ones(2, 2), torch.ones(1), 0.1), ValueError, r"codes should be \[4, 4\] like scores, got \[2, 2\]"),
    ("prototype_loss_backward_scores", (torch.ones(3), ONE, ONE, torch.ones(3), 0.1), ValueError, r"grad should be \[\], got \[3\]"),
    ("prototype_loss_backward_scores", (torch.ones(()), ONE, ONE, torch.ones(1), 0.1), ValueError, r"logsumexp should be \[3\], got \[1\]"),
    ("prototype_loss_backward_scores", (torch.ones(()).double(), ONE, ONE, torch.ones(3), 0.1), TypeError, "grad should be torch.float32, got torch.float64"),
    ("prototype_loss_backward_scores", (torch.ones(()).half(), HALF, HALF, torch.ones(3).half(), 0.1), TypeError, "logsumexp should be torch.float32, got torch.float16"),
    ("prototype_loss_backward_codes", (torch.ones(()), torch.ones(0, 4), torch.ones(0), 0.1), ValueError, r"scores should be \[..., B, M\] with B, M >= 1, got \[0, 4\]"),
    ("prototype_loss_backward_codes", (torch.ones(()), ONE, torch.ones(4), 0.1), ValueError, r"logsumexp should be \[3\], got \[4\]"),
    ("prototype_loss_backward_codes", (torch.ones(()), ONE, torch.ones(3), 0.0), ValueError, "temperature should be positive"),
    ("intrinsic_loss_backward", (torch.ones(()), ONE, torch.ones(4, 4)), ValueError, r"weights should be \[3, 3\], got \[4, 4\]"),
    ("intrinsic_loss_backward", (torch.ones(2), ONE, torch.ones(3, 3)), ValueError, r"grad should be \[\], got \[2\]"),
    ("intrinsic_loss_backward", (torch.ones(()), ONE, torch.ones(3, 3).double()), TypeError, "weights should be torch.float32"),
    ("random_shift_backward", (torch.ones(2, 3, 4, 4).int(), torch.zeros(2, 2).long(), 1), TypeError, "grad should be float32, float16, bfloat16, float64, got torch.int32"),
    ("random_shift_backward", (torch.ones(2, 3, 4), torch.zeros(2, 2).long(), 1), ValueError, r"grad should be \[B, C, H, W\]"),
    ("random_shift_backward", (torch.ones(2, 3, 4, 4), torch.zeros(1, 2).long(), 1), ValueError, r"shifts should be \[2, 2\], got \[1, 2\]"),
    ("knn_distance_backward_queries", (torch.ones(2), ONE, TWO, torch.ones(3), INDEX), ValueError, r"grad should be \[3\], got \[2\]"),
    ("knn_distance_backward_queries", (torch.ones(3), ONE, TWO, torch.ones(4), INDEX), ValueError, r"distance should be \[3\], got \[4\]"),
    ("knn_distance_backward_queries", (torch.ones(3), ONE, TWO, torch.ones(3), INDEX[:2]), ValueError, r"index should be \[3\], got \[2\]"),
    ("knn_distance_backward_keys", (torch.ones(3), ONE, TWO, torch.ones(3), INDEX.int()), TypeError, "index should be torch.int64, got torch.int32"),
    ("knn_distance_backward_keys", (torch.ones(3), ONE, torch.ones(2, 5), torch.ones(3), INDEX), ValueError, r"keys should be \[Q, 4\]"),
    ("knn_distance_backward_keys", (torch.ones(3).half(), HALF, HALF, torch.ones(3), INDEX), TypeError, "grad should be torch.float32, got torch.float16"),
]  # fmt: skip
VALUES = [
    ("knn_distance_backward_queries", INDEX + torch.tensor([0, 2, 0]), r"index should be in \[0, 1\], got 2 at \[1\]"),
    ("knn_distance_backward_keys", INDEX - torch.tensor([0, 0, 1]), r"index should be in \[0, 1\], got -1 at \[2\]"),
]  # fmt: skip


@pytest.mark.parametrize("to", ["cpu", "meta"])
@pytest.mark.parametrize(("operator", "args", "error", "message"), WRONG)
def test_errors(
    operator: str, args: tuple[Any, ...], error: type[Exception], message: str, to: str
) -> None:
    """By the kernel and by its fake."""
    args = tuple(x.to(to) if isinstance(x, torch.Tensor) else x for x in args)
    with pytest.raises(error, match=message):
        getattr(torch.ops.crpt, operator)(*args)


def test_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="weights should be on cpu, got meta"):
        torch.ops.crpt.intrinsic_loss_backward(torch.ones(()), ONE, torch.ones(3, 3, device="meta"))


@pytest.mark.parametrize(("operator", "index", "message"), VALUES)
def test_an_index_outside_the_keys_is_refused(
    operator: str, index: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.crpt, operator)(torch.ones(3), ONE, TWO, torch.ones(3), index)
