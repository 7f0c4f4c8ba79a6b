from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import call, differentiable_once, fake, gradient, in_transform
from crpt.ops.conditions import compute_dtype


def prototype_objective(
    embeddings: Tensor,
    prototypes: Tensor,
    codes: Tensor,
    temperature: float = 0.1,
    intrinsic_weight: float = 0.005,
    offset: float = 1.5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The whole objective, given the codes: comparison and intrinsic loss, and all gradients.

    .. math::
        L = L_{comp} + w L_{intr}, \qquad
        L_{comp} = -\frac{1}{B} \sum_{bm} q_{bm} \log \operatorname{softmax}_m
        \Big(\frac{\langle e_b, c_m \rangle}{T |e_b|}\Big), \qquad
        L_{intr} = \frac{1}{M^2} \sum_{i \ne j} \frac{s_{ij}}{\operatorname{sg}(s_{ij}) + offset}

    The same as `prototype_loss` of the normalised embeddings times the prototypes, plus w times
    `intrinsic_loss`, in one operator that has its gradients ready when it has its value: nothing of
    size B x M or M x M stays for the backward pass. The prototypes are taken as they are (keep
    their rows at unit length), so that their gradient is that of a plain product.

    Args:
        embeddings: e, [..., B, D], B, D >= 1; float32, float16, bfloat16 or float64.
        prototypes: c, [..., M, D], M >= 1; dtype, device and leading dimensions of the embeddings.
        codes: q, [..., B, M], likewise; usually from `sinkhorn`. They are targets: no gradient
            reaches them.
        temperature: T, in [1.2e-38, 8.5e37] (for float64 [2.3e-308, 4.4e307]), so that T and 1 / T
            are numbers of the type computed in.
        intrinsic_weight: w >= 0; with 0 the intrinsic loss has no part in L, whatever its value.
        offset: > 0, within the same bounds; of the intrinsic loss, whose derivative is one-sided
            (see there).

    Returns:
        (L, L_comp, L_intr), each [...] in the dtype of the embeddings, computed in float32 (float64
        for float64). L is differentiable, once; the other two are for reports and carry no
        gradient.

    Raises:
        TypeError: type or dtype.
        ValueError: shape, device, temperature, intrinsic_weight or offset.

    Source: CRPTpro (arXiv 2302.05614), section 3.
    """
    embeddings, prototypes, codes = arguments.several(
        ("embeddings", "prototypes", "codes"), embeddings, prototypes, codes
    )
    grad, unknown = torch.is_grad_enabled(), in_transform()
    loss, comparison, intrinsic, _, _ = call(
        "prototype_objective",
        embeddings,
        prototypes,
        codes.detach(),
        arguments.real("temperature", temperature),
        arguments.real("intrinsic_weight", intrinsic_weight),
        arguments.real("offset", offset),
        grad and (unknown or embeddings.requires_grad),
        grad and (unknown or prototypes.requires_grad),
    )
    return loss, comparison, intrinsic


@fake("prototype_objective")
def _(
    embeddings: Tensor,
    prototypes: Tensor,
    codes: Tensor,
    temperature: float,
    intrinsic_weight: float,
    offset: float,
    of_embeddings: bool,
    of_prototypes: bool,
) -> tuple[Tensor, ...]:
    checks.prototype_objective(embeddings, prototypes, codes, temperature, intrinsic_weight, offset)
    compute, leading = compute_dtype(embeddings.dtype), embeddings.shape[:-2]
    return (
        *(embeddings.new_empty(leading) for _ in range(3)),
        embeddings.new_empty(embeddings.shape if of_embeddings else (*leading, 0), dtype=compute),
        embeddings.new_empty(prototypes.shape if of_prototypes else (*leading, 0), dtype=compute),
    )


@fake("prototype_objective_backward")
def _(
    grad: Tensor,
    grad_embeddings: Tensor,
    grad_prototypes: Tensor,
    embeddings: Tensor,
    prototypes: Tensor,
) -> tuple[Tensor, Tensor]:
    checks.prototype_objective_backward(
        grad, grad_embeddings, grad_prototypes, embeddings, prototypes
    )
    dtype = embeddings.dtype
    return (
        grad_embeddings.new_empty(grad_embeddings.shape, dtype=dtype),
        grad_prototypes.new_empty(grad_prototypes.shape, dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[3:], *inputs[:2])
    ctx.known = inputs[6:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    wanted = ctx.needs_input_grad[:2]
    if any(w and not k for w, k in zip(wanted, ctx.known, strict=True)):
        raise RuntimeError("crpt::prototype_objective was called without a gradient that is needed")
    # The inputs go along only so that a second derivative is refused instead of being left out.
    gradients = call("prototype_objective_backward", grad, *ctx.saved_tensors)
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * 6)


gradient("prototype_objective", _backward, _setup)
differentiable_once("prototype_objective_backward")
