"""The operators inside torch's own modes: forward-mode differentiation, autocast, and graphs whose
sizes depend on data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_samples import SAMPLES, Sample
from test_common import differentiable
from torch import Tensor
from torch.autograd import forward_ad

from crpt import ops


@differentiable
def test_forward_mode_derivatives_are_refused(sample: Sample, device: str) -> None:
    args, kwargs = sample.arguments(torch.float64, device)
    inputs = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]

    def function(x: Tensor, i: int) -> Tensor:
        return sample.function(*args[:i], x, *args[i + 1 :], **kwargs)

    for i in inputs:
        with pytest.raises(NotImplementedError, match="should have no tangent: forward-mode"):
            torch.func.jvp(lambda x, i=i: function(x, i), (args[i],), (torch.ones_like(args[i]),))
        with forward_ad.dual_level():
            function(args[i], i)  # not a dual tensor
            dual = forward_ad.make_dual(args[i], torch.ones_like(args[i]))
            with pytest.raises(NotImplementedError, match="should have no tangent: forward-mode"):
                function(dual, i)


MIXED = ("prototype_similarity", "prototype_loss", "prototype_objective", "knn_distance")


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.operator in MIXED and s.name == "plain"], ids=str
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_promotes_mixed_inputs_to_the_widest(
    sample: Sample, compiled: bool, device: str
) -> None:
    """As where a linear layer under autocast meets parameters in float32."""
    torch._dynamo.reset()
    function: Any = sample.function
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    (first, second, *rest), kwargs = sample.arguments(torch.float32, device)
    for a, b in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        inputs = [first.to(a).requires_grad_(), second.to(b).requires_grad_()]
        with torch.autocast(device, dtype=torch.bfloat16):
            out = function(*inputs, *rest, **kwargs)
        wide = [x.detach().float().requires_grad_() for x in inputs]
        expected = sample.function(*wide, *rest, **kwargs)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected)
        got = torch.autograd.grad(out.sum(), inputs)
        for g, x, e in zip(got, inputs, torch.autograd.grad(expected.sum(), wide), strict=True):
            assert g.dtype == x.dtype
            torch.testing.assert_close(g, e.to(g.dtype))
        with pytest.raises(TypeError, match="should be torch"):
            sample.function(*inputs, *rest, **kwargs)
    with torch.autocast(device), pytest.raises(TypeError, match="should be"):
        sample.function(first.long(), second, *rest, **kwargs)
    # Neither holds the other's range and precision.
    with torch.autocast(device):
        halves = sample.function(first.half(), second.bfloat16(), *rest, **kwargs)
    assert halves.dtype == torch.float32


KEPT = torch.tensor([True, False, True, True, False, True])
CODES = torch.rand(6, 5).softmax(-1)
TARGETS = torch.rand(6, 6).softmax(-1)
FRAMES = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8)
SHIFTS = torch.randint(-1, 2, (6, 2))
DATA_DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "sinkhorn": lambda x: ops.sinkhorn(x[KEPT]),
    "prototype_similarity": lambda x: ops.prototype_similarity(x[KEPT], CODES[KEPT]),
    "prototype_loss": lambda x: ops.prototype_loss(x[KEPT], CODES[KEPT]),
    "prototype_objective": lambda x: ops.prototype_objective(x[KEPT], CODES, TARGETS[KEPT])[0],
    "intrinsic_loss": lambda x: ops.intrinsic_loss(x[KEPT]),
    "random_shift": lambda x: ops.random_shift(FRAMES[KEPT] * x[0, 0], 1, SHIFTS[KEPT]),
    "frame_stack": lambda x: ops.frame_stack(FRAMES[KEPT], torch.arange(3)[:, None]),
    "knn_distance": lambda x: ops.knn_distance(x, CODES[KEPT], 2),
}


@pytest.mark.parametrize("operator", DATA_DEPENDENT)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_where_sizes_depend_on_data(operator: str) -> None:
    torch._dynamo.reset()
    function = DATA_DEPENDENT[operator]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.rand(6, 5, requires_grad=True)
    got, expected = compiled(x), function(x)
    assert torch.equal(got, expected)
    assert got.requires_grad is expected.requires_grad
    if got.requires_grad:
        (grad,) = torch.autograd.grad(got.sum(), x)
        assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_size_that_turns_out_wrong_is_an_error_as_the_graph_runs() -> None:
    torch._dynamo.reset()
    loss = torch.compile(
        lambda keep, codes: ops.prototype_loss(torch.ones(6, 5)[keep], codes),
        fullgraph=True,
        backend="aot_eager",
    )
    assert loss(KEPT, CODES[:4]).isfinite()
    with pytest.raises((ValueError, RuntimeError)):
        loss(~KEPT, CODES[:4])
