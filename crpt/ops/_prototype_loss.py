from __future__ import annotations

from typing import Any

from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import call, differentiable_once, fake, gradient
from crpt.ops.checks import compute_dtype


def prototype_loss(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Cross-entropy between codes and the softmax of scores, mean over the samples.

    .. math::
        L = -\frac{1}{B} \sum_b \sum_m q_{bm} \log \operatorname{softmax}_m(scores_b / T)

    Args:
        scores: [..., B, M], B, M >= 1; float32, float16, bfloat16 or float64.
        codes: q, shape, dtype and device of the scores; usually from `sinkhorn`. Rows need not sum
            to 1.
        temperature: T > 0.

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
    return call("prototype_loss", scores, codes, arguments.real("temperature", temperature))[0]


@fake("prototype_loss")
def _(scores: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    checks.prototype_loss(scores, codes, temperature)
    compute = compute_dtype(scores.dtype)
    return scores.new_empty(scores.shape[:-2]), scores.new_empty(scores.shape[:-1], dtype=compute)


@fake("prototype_loss_backward_scores")
def _(grad: Tensor, scores: Tensor, codes: Tensor, logsumexp: Tensor, temperature: float) -> Tensor:
    checks.prototype_loss_backward_scores(grad, scores, codes, logsumexp, temperature)
    return scores.new_empty(scores.shape)


@fake("prototype_loss_backward_codes")
def _(grad: Tensor, scores: Tensor, logsumexp: Tensor, temperature: float) -> Tensor:
    checks.prototype_loss_backward_codes(grad, scores, logsumexp, temperature)
    return scores.new_empty(scores.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    scores, codes, ctx.temperature = inputs
    ctx.save_for_backward(scores, codes if ctx.needs_input_grad[0] else None, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    scores, codes, logsumexp = ctx.saved_tensors
    t = ctx.temperature
    wants_scores, wants_codes = ctx.needs_input_grad[:2]
    return (
        call("prototype_loss_backward_scores", grad, scores, codes, logsumexp, t)
        if wants_scores
        else None,
        call("prototype_loss_backward_codes", grad, scores, logsumexp, t) if wants_codes else None,
        None,
    )


gradient("prototype_loss", _backward, _setup)
differentiable_once("prototype_loss_backward_scores")
differentiable_once("prototype_loss_backward_codes")
