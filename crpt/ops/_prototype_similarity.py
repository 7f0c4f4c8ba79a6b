from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import call, differentiable_once, fake, gradient
from crpt.ops.conditions import compute_dtype


def prototype_similarity(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    r"""Cosine of every embedding with every prototype.

    .. math::
        similarity_{bm} = \frac{\langle e_b, c_m \rangle}{\max(|e_b|, 10^{-12}) \max(|c_m|,
        10^{-12})}

    Rows longer than 1.8e19 in float32 (1.3e154 in float64), whose squares overflow, count as
    infinitely long: their similarity is 0, as in torch.nn.functional.normalize.

    Args:
        embeddings: [..., B, D], D >= 1; float32, float16, bfloat16 or float64. B may be 0.
        prototypes: [..., M, D], M >= 1, dtype and device of the embeddings. Leading dimensions
            broadcast, as in torch.matmul.

    Returns:
        similarity [..., B, M] in the dtype of the inputs, computed in float32 (float64 for
        float64). Differentiable, once, in both.

    Raises:
        TypeError: type or dtype.
        ValueError: shape or device.

    Source: CRPTpro (arXiv 2302.05614), section 3.
    """
    embeddings, prototypes = arguments.pair(("embeddings", "prototypes"), embeddings, prototypes)
    return call("prototype_similarity", embeddings, prototypes)[0]


@fake("prototype_similarity")
def _(embeddings: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    checks.prototype_similarity(embeddings, prototypes)
    compute = compute_dtype(embeddings.dtype)
    leading = torch.broadcast_shapes(embeddings.shape[:-2], prototypes.shape[:-2])
    return (
        embeddings.new_empty((*leading, embeddings.shape[-2], prototypes.shape[-2])),
        embeddings.new_empty(embeddings.shape, dtype=compute),
        prototypes.new_empty(prototypes.shape, dtype=compute),
        embeddings.new_empty(embeddings.shape[:-1], dtype=compute),
        prototypes.new_empty(prototypes.shape[:-1], dtype=compute),
    )


@fake("prototype_similarity_backward")
def _(grad: Tensor, unit: Tensor, norm: Tensor, other: Tensor) -> Tensor:
    checks.prototype_similarity_backward(grad, unit, norm, other)
    return unit.new_empty(unit.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    # The unit rows stay differentiable, though nobody differentiates them: through them the
    # gradient depends on the inputs, and a second derivative is refused instead of being left out.
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype


def _backward(
    ctx: Any, grad: Tensor | None, grad_e: Tensor | None, grad_c: Tensor | None, *_: None
) -> tuple[Tensor | None, Tensor | None]:
    unit_e, unit_c, norm_e, norm_c = ctx.saved_tensors
    wants_e, wants_c = ctx.needs_input_grad[:2]
    grad_t = None if grad is None else grad.mT
    return (
        _rows(grad, grad_e, unit_e, norm_e, unit_c, ctx.dtype) if wants_e else None,
        _rows(grad_t, grad_c, unit_c, norm_c, unit_e, ctx.dtype) if wants_c else None,
    )


def _rows(
    grad: Tensor | None,
    grad_unit: Tensor | None,
    unit: Tensor,
    norm: Tensor,
    other: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:
    """What reaches rows by way of the similarity, and by way of their `unit` if that was used."""
    total = None
    if grad is not None:
        total = call("prototype_similarity_backward", grad, unit, norm, other)
    if grad_unit is not None:  # unit rows are their own similarity with the axes
        axes = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
        own = call("prototype_similarity_backward", grad_unit, unit, norm, axes)
        total = own if total is None else total + own
    return None if total is None else total.to(dtype)


gradient("prototype_similarity", _backward, _setup)
differentiable_once("prototype_similarity_backward")
