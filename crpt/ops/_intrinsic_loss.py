from __future__ import annotations

from typing import Any

from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import call, differentiable_once, fake, gradient
from crpt.ops.conditions import compute_dtype


def intrinsic_loss(prototypes: Tensor, offset: float = 1.5) -> Tensor:
    r"""What pushes prototypes apart: similar pairs weigh less than dissimilar ones gain.

    .. math::
        L = \frac{1}{M^2} \sum_{i \ne j} \frac{s_{ij}}{\operatorname{sg}(s_{ij}) + offset}, \qquad
        s_{ij} = \langle \operatorname{sg}(c_i), c_j \rangle, \qquad
        \frac{dL}{dc_j} = \frac{1}{M^2} \sum_{i \ne j} \frac{c_i}{s_{ij} + offset}

    sg stops the gradient, so the derivative is one-sided: it reaches c_j only, and is not the
    derivative of the value (finite differences of L do not give it).

    Args:
        prototypes: c, [..., M, D], M, D >= 1; float32, float16, bfloat16 or float64. Usually unit
            rows: then s lies in [-1, 1], and offset > 1 keeps the denominator positive.
        offset: > 0, in [1.2e-38, 8.5e37] (for float64 [2.3e-308, 4.4e307]), so that it and its
            inverse are numbers of the type computed in.

    Returns:
        loss [...] in the dtype of the prototypes, computed in float32 (float64 for float64).
        Differentiable once.

    Raises:
        TypeError: type or dtype.
        ValueError: shape, device or offset.

    Source: L_intr of CRPTpro (arXiv 2302.05614), section 3.
    """
    arguments.tensor("prototypes", prototypes)
    return call("intrinsic_loss", prototypes, arguments.real("offset", offset))[0]


@fake("intrinsic_loss")
def _(prototypes: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    checks.intrinsic_loss(prototypes, offset)
    *leading, m, _d = prototypes.shape
    weights = prototypes.new_empty((*leading, m, m), dtype=compute_dtype(prototypes.dtype))
    return prototypes.new_empty(leading), weights


@fake("intrinsic_loss_backward")
def _(grad: Tensor, prototypes: Tensor, weights: Tensor) -> Tensor:
    checks.intrinsic_loss_backward(grad, prototypes, weights)
    return prototypes.new_empty(prototypes.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    if grad is None:
        return None, None
    return call("intrinsic_loss_backward", grad, *ctx.saved_tensors), None


gradient("intrinsic_loss", _backward, _setup)
differentiable_once("intrinsic_loss_backward")
