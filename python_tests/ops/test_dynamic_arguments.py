"""Integers that vary need no graph each, and what is documented for floats, which do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_samples import cosine, integers, pixels, units
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from crpt import ops


def sample(make: Callable[[torch.Generator], Tensor]) -> Tensor:
    x = make(torch.Generator().manual_seed(0))
    return x.float() if x.is_floating_point() else x


SCORES, POINTS, IMAGES = sample(cosine(9, 14)), sample(units(16, 5)), sample(cosine(4, 3, 6, 7))
FRAMES, INDEX = sample(pixels(8, 3, 6, 7)), sample(integers(0, 7, 4, 2))
EMBEDDINGS, PROTOTYPES, CODES = POINTS[:9], sample(units(14, 5)), SCORES.softmax(-1)
SHIFTS = sample(integers(-1, 1, 4, 2))
# More than the eight graphs of one function after which torch.compile gives up.
VALUES = range(1, 13)

OF_AN_INTEGER: dict[str, tuple[Callable[[Tensor, int], Tensor], Tensor]] = {
    "sinkhorn": (lambda x, n: ops.sinkhorn(x, iterations=n), SCORES),
    "random_shift": (lambda x, n: ops.random_shift(x, n, SHIFTS), IMAGES),
    "random_shift, drawn": (lambda x, n: ops.random_shift(x, n), IMAGES),
    "frame_stack": (lambda x, n: ops.frame_stack(x, INDEX, SHIFTS, n), FRAMES),
    "knn_distance": (lambda x, n: ops.knn_distance(x, 2 * x, n), POINTS),
    "knn_distance under vmap": (
        lambda x, n: torch.vmap(lambda q: ops.knn_distance(q, POINTS, n))(torch.stack([x, -x])),
        POINTS,
    ),
}
integer_arguments = pytest.mark.parametrize("name", OF_AN_INTEGER)


def graphs(function: Callable[..., Tensor], calls: list[tuple[Any, ...]]) -> int:
    """How many graphs those calls take; they return what the function does, gradients too."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for args in calls:
        results = []
        for call in (compiled, function):
            torch.manual_seed(1)
            x = args[0].clone().requires_grad_(args[0].is_floating_point())
            out = call(x, *args[1:])
            grad = torch.autograd.grad(out.sum(), x)[0] if out.requires_grad else None
            results.append((out, grad))
        torch.testing.assert_close(results[0], results[1])
    return counter.frame_count


@integer_arguments
def test_integers_found_to_vary_cost_one_recompilation(name: str) -> None:
    function, x = OF_AN_INTEGER[name]
    assert graphs(function, [(x, n) for n in VALUES]) == 2


def test_an_integer_made_of_a_size_costs_no_graph_of_its_own() -> None:
    batches = [(torch.rand(n, 8),) for n in range(4, 28, 2)]
    assert graphs(lambda x: ops.knn_distance(x, 2 * x, x.shape[0] // 2), batches) == 2


@integer_arguments
def test_integers_read_from_a_tensor(name: str) -> None:
    function, x = OF_AN_INTEGER[name]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        calls = [(x, torch.tensor(n)) for n in (1, 5, 2)]
        assert graphs(lambda x, n: function(x, n.item()), calls) == 1


@integer_arguments
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
def test_exported_with_any_integer(name: str, strict: bool) -> None:
    function, x = OF_AN_INTEGER[name]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return function(x, n)

    shapes = {"x": None, "n": Dim.DYNAMIC}
    program = torch.export.export(Module(), (x, 3), dynamic_shapes=shapes, strict=strict).module()
    for n in VALUES:
        torch.manual_seed(1)
        got = program(x, n)
        torch.manual_seed(1)
        assert torch.equal(got, function(x, n))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        program(x, -1)


def objective(c: Tensor, temperature: Any, weight: Any) -> Tensor:
    """prototype_objective's loss, as its help says it for floats that vary."""
    scores = ops.prototype_similarity(EMBEDDINGS, c)
    loss = ops.prototype_loss(scores / temperature, CODES, 1.0)
    return loss + weight * ops.intrinsic_loss(c)


# The remedies of help(crpt.ops), and what each stands for.
OF_FLOATS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]] = {
    "sinkhorn": (
        lambda x, t, w: ops.sinkhorn(x / t, 1.0),
        lambda x, t, w: ops.sinkhorn(x, float(t)),
        SCORES,
    ),
    "prototype_loss": (
        lambda x, t, w: ops.prototype_loss(x / t, CODES, 1.0),
        lambda x, t, w: ops.prototype_loss(x, CODES, float(t)),
        SCORES,
    ),
    "prototype_objective": (
        objective,
        lambda c, t, w: ops.prototype_objective(EMBEDDINGS, c, CODES, float(t), float(w))[0],
        PROTOTYPES,
    ),
}


@pytest.mark.parametrize("name", OF_FLOATS)
@pytest.mark.parametrize(("kind", "count"), [(float, 2), (torch.tensor, 1)], ids=["float", "0-d"])
def test_floats_that_vary_outside_of_the_operators(
    name: str, kind: Callable[[float], Any], count: int
) -> None:
    remedy, meant, x = OF_FLOATS[name]
    calls = [(x, kind(0.1 * n), kind(0.01 * n)) for n in VALUES]
    for args in calls:
        torch.testing.assert_close(remedy(*args), meant(*args))
    assert graphs(remedy, calls) == count


def test_floats_are_compiled_in() -> None:
    """The day on which this fails, help(crpt.ops) need not warn of it."""
    assert graphs(ops.sinkhorn, [(SCORES, 0.1 * n) for n in range(1, 5)]) >= 4
