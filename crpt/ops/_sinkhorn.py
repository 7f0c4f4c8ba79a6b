from __future__ import annotations

import torch
from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import fake, not_differentiable


def sinkhorn(scores: Tensor, temperature: float = 0.1, iterations: int = 3) -> Tensor:
    r"""Soft, balanced assignment of samples to prototypes by Sinkhorn-Knopp.

    .. math::
        K = \exp((scores - \max scores) / T), \qquad
        \text{repeat: } \sum_b q_{bm} = 1/M, \; \sum_m q_{bm} = 1/B; \qquad
        \text{last: } \sum_m q_{bm} = 1

    Computed in float32 (float64 for float64) whatever the dtype of the scores, in log space where
    exp could not hold them: a prototype that nothing is near, or scores of any finite width, give
    finite codes. NaN stays NaN.

    Args:
        scores: [..., B, M], B, M >= 1; float32, float16, bfloat16 or float64. Leading dimensions
            are separate problems.
        temperature: T > 0.
        iterations: >= 0; with 0 the codes are the softmax of scores / T.

    Returns:
        codes [..., B, M] in the dtype of the scores. They carry no gradient: in the loss they are
        targets.

    Raises:
        TypeError: scores is no tensor, or its dtype is not one of the above.
        ValueError: shape, device, temperature or iterations.

    Source: CRPTpro (arXiv 2302.05614), section 3; SwAV (arXiv 2006.09882), appendix A.
    """
    arguments.tensor("scores", scores)
    return torch.ops.crpt.sinkhorn(
        scores,
        arguments.real("temperature", temperature),
        arguments.integer("iterations", iterations),
    )


@fake("sinkhorn")
def _(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    checks.sinkhorn(scores, temperature, iterations)
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


not_differentiable("sinkhorn")
