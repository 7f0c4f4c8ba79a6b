"""The operators inside torch's own modes: forward-mode differentiation and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_samples import SAMPLES, Sample
from test_common import differentiable
from torch import Tensor
from torch.autograd import forward_ad


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


MIXED = ("prototype_similarity", "prototype_loss", "knn_distance")


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
