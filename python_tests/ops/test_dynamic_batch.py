"""One compiled graph serves every batch size: forwards and backwards, with no recompilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from crpt import ops

SIZES = (7, 12, 33, 2)
Arguments = tuple[Any, ...]


def codes(b: int) -> Tensor:
    return torch.rand(b, 9).softmax(-1)


def shifts(b: int) -> Tensor:
    return torch.randint(-2, 3, (b, 2))


def frames(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 6, 5), dtype=torch.uint8)


def objective(embeddings: Tensor, prototypes: Tensor, codes: Tensor) -> Tensor:
    """With a gradient for the codes too, which the operator has none for."""
    return ops.prototype_objective(embeddings, prototypes, codes)[0] + codes.sum()


# Arguments for a batch of b; in tensors of that size, dimension `dim` is it.
BATCHES: dict[str, tuple[Callable[..., Tensor], Callable[[int], Arguments], tuple[int, ...], int]] = {
    "sinkhorn": (ops.sinkhorn, lambda b: (torch.rand(b, 9),), (0,), 0),
    "sinkhorn, problems": (ops.sinkhorn, lambda b: (torch.rand(b, 5, 9),), (0,), 0),
    "prototype_similarity": (
        ops.prototype_similarity, lambda b: (torch.randn(b, 8), torch.randn(9, 8)), (0,), 0,
    ),
    "prototype_loss": (ops.prototype_loss, lambda b: (torch.rand(b, 9), codes(b)), (0, 1), 0),
    "prototype_objective": (
        objective, lambda b: (torch.randn(b, 8), torch.randn(9, 8), codes(b)), (0, 2), 0,
    ),
    "prototype_objective, problems": (
        objective,
        lambda b: (torch.randn(b, 5, 8), torch.randn(b, 9, 8), codes(5).expand(b, 5, 9).clone()),
        (0, 1, 2),
        0,
    ),
    "intrinsic_loss": (ops.intrinsic_loss, lambda b: (torch.rand(b, 8),), (0,), 0),
    "random_shift": (
        ops.random_shift, lambda b: (torch.rand(b, 3, 6, 5), 2, shifts(b)), (0, 2), 0,
    ),
    "random_shift, drawn": (ops.random_shift, lambda b: (torch.rand(b, 3, 6, 5),), (0,), 0),
    "random_shift, height": (
        ops.random_shift, lambda b: (torch.rand(4, 3, b, 5), 2, shifts(4)), (0,), 2,
    ),
    "frame_stack": (
        ops.frame_stack,
        lambda b: (frames(20), torch.randint(0, 20, (b, 3)), shifts(b), 2, torch.float32),
        (1, 2),
        0,
    ),
    "frame_stack, frames": (
        ops.frame_stack, lambda n: (frames(n), torch.randint(0, n, (4, 3))), (0,), 0,
    ),
    "knn_distance": (
        ops.knn_distance, lambda b: (torch.randn(b, 8), torch.randn(30, 8), 3), (0,), 0,
    ),
    "knn_distance, keys": (
        ops.knn_distance, lambda q: (torch.randn(4, 8), torch.randn(q, 8), 2), (1,), 0,
    ),
}  # fmt: skip


def step(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator between others, so that a graph does not consist of it alone."""
    return lambda *args: function(*args) * 2


@pytest.mark.parametrize("name", BATCHES)
def test_one_graph_for_every_batch_size(name: str, device: str) -> None:
    function, make, dynamic, dim = BATCHES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step(function), fullgraph=True, backend=counter)
    for size in SIZES:
        args = [x.to(device) if isinstance(x, Tensor) else x for x in make(size)]
        for x in args:
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
        for i in dynamic:
            torch._dynamo.mark_dynamic(args[i], dim)  # an error, should tracing fix the size
        torch.manual_seed(1)
        got = compiled(*args)
        torch.manual_seed(1)
        expected = step(function)(*args)
        assert torch.equal(got, expected)
        inputs = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        if expected.requires_grad:
            weight = torch.randn_like(expected)
            pairs = zip(
                torch.autograd.grad(got, inputs, weight),
                torch.autograd.grad(expected, inputs, weight),
                strict=True,
            )
            for g, e in pairs:
                torch.testing.assert_close(g, e)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", BATCHES)
def test_sizes_found_to_vary_cost_one_recompilation(name: str) -> None:
    """Without a hint: the first size is taken as fixed, the second makes it dynamic, for good."""
    function, make, _, _ = BATCHES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step(function), fullgraph=True, backend=counter)
    for size in SIZES:
        compiled(*make(size))
    assert counter.frame_count == 2
