from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import call, differentiable_once, fake, gradient, in_transform
from crpt.ops.conditions import compute_dtype


def prototype_loss(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Cross-entropy between codes and the softmax of scores, mean over the samples.

    .. math::
        L = -\frac{1}{B} \sum_b \sum_m q_{bm} \log \operatorname{softmax}_m(scores_b / T)

    Args:
        scores: [..., B, M], B, M >= 1; float32, float16, bfloat16 or float64.
        codes: q, shape, dtype and device of the scores; usually from `sinkhorn`. Rows need not sum
            to 1.
        temperature: T, in [1.2e-38, 8.5e37] (for float64 [2.3e-308, 4.4e307]), so that T and 1 / T
            are numbers of the type computed in.

    Returns:
        loss [...] in the dtype of the scores, computed in float32 (float64 for float64).
        Differentiable, once, in scores and codes; each gradient is computed only where it is
        needed.

    Raises:
        TypeError: type or dtype.
        ValueError: shape, device or temperature.

    Source: L_comp of CRPTpro (arXiv 2302.05614), section 3.
    """
    scores, codes = arguments.pair(("scores", "codes"), scores, codes)
    # On a CPU the gradient costs little in the same pass, and a pass of its own as much again. Of
    # narrow scores it would be twice their memory, held until the backward pass.
    of_scores = (
        scores.is_cpu
        and scores.dtype in (torch.float32, torch.float64)
        and torch.is_grad_enabled()
        and (scores.requires_grad or in_transform())
    )
    temperature = arguments.real("temperature", temperature)
    return call("prototype_loss", scores, codes, temperature, of_scores)[0]


@fake("prototype_loss")
def _(
    scores: Tensor, codes: Tensor, temperature: float, of_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.prototype_loss(scores, codes, temperature)
    compute, leading = compute_dtype(scores.dtype), scores.shape[:-2]
    return (
        scores.new_empty(leading),
        scores.new_empty(scores.shape[:-1], dtype=compute),
        scores.new_empty(scores.shape if of_scores else (*leading, 0), dtype=compute),
    )


@fake("prototype_loss_backward")
def _(grad: Tensor, grad_scores: Tensor, scores: Tensor, codes: Tensor) -> Tensor:
    checks.prototype_loss_backward(grad, grad_scores, scores, codes)
    return scores.new_empty(scores.shape)


@fake("prototype_loss_backward_scores")
def _(grad: Tensor, scores: Tensor, codes: Tensor, logsumexp: Tensor, temperature: float) -> Tensor:
    checks.prototype_loss_backward_scores(grad, scores, codes, logsumexp, temperature)
    return scores.new_empty(scores.shape)


@fake("prototype_loss_backward_codes")
def _(grad: Tensor, scores: Tensor, logsumexp: Tensor, temperature: float) -> Tensor:
    checks.prototype_loss_backward_codes(grad, scores, logsumexp, temperature)
    return scores.new_empty(scores.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, codes, ctx.temperature, ctx.known = inputs
    _, logsumexp, grad_scores = output
    of_scores, of_codes = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        scores,
        codes if of_scores else None,
        logsumexp if of_codes or not ctx.known else None,
        grad_scores if ctx.known else None,
    )
    ctx.mark_non_differentiable(logsumexp, grad_scores)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    scores, codes, logsumexp, grad_scores = ctx.saved_tensors
    of_scores, of_codes = ctx.needs_input_grad[:2]
    t, for_scores, for_codes = ctx.temperature, None, None
    if of_scores and ctx.known:
        # The inputs go along only so that a second derivative is refused, not left out.
        for_scores = call("prototype_loss_backward", grad, grad_scores, scores, codes)
    elif of_scores:
        for_scores = call("prototype_loss_backward_scores", grad, scores, codes, logsumexp, t)
    if of_codes:
        for_codes = call("prototype_loss_backward_codes", grad, scores, logsumexp, t)
    return for_scores, for_codes, None, None


gradient("prototype_loss", _backward, _setup)
differentiable_once("prototype_loss_backward")
differentiable_once("prototype_loss_backward_scores")
differentiable_once("prototype_loss_backward_codes")
