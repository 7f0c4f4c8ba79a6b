from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops._sinkhorn_group import sinkhorn_group
from crpt.ops.autograd import call, fake, in_transform, not_differentiable, under_vmap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sinkhorn(
    scores: Tensor,
    temperature: float = 0.1,
    iterations: int = 3,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Soft, balanced assignment of samples to prototypes by Sinkhorn-Knopp.

    .. math::
        K = \exp((scores - \max scores) / T), \qquad
        \text{repeat: } \sum_b q_{bm} = 1/M, \; \sum_m q_{bm} = 1/B; \qquad
        \text{last: } \sum_m q_{bm} = 1

    Computed in float32 (float64 for float64) whatever the dtype of the scores, in log space where
    exp could not hold them: a prototype that nothing is near, or scores of any finite width, give
    finite codes, and so does -inf. A NaN anywhere in a problem makes all of its codes NaN, and so
    does +inf where there is an iteration.

    Args:
        scores: [..., B, M], B, M >= 1; float32, float16, bfloat16 or float64. Leading dimensions
            are separate problems.
        temperature: T, in [1.2e-38, 8.5e37] (for float64 [2.3e-308, 4.4e307]), so that T and 1 / T
            are numbers of the type computed in.
        iterations: in [0, 100000]; with 0 the codes are the softmax of scores / T.
        group: a torch.distributed process group whose processes each hold some samples of one
            batch. The sums over b then run over the samples of all, and the codes returned are
            those of this process's samples: what one process would compute on the concatenated
            batch. None: the batch is here. See below.

    Returns:
        codes [..., B, M] in the dtype of the scores, contiguous. They carry no gradient: in the
        loss they are targets.

    Raises:
        TypeError: scores is no tensor, or its dtype is not one of the above; temperature,
            iterations or group of another type.
        ValueError: shape, device, temperature or iterations.

    With a group this is a collective: each of its processes calls it, with the same leading
    dimensions, M, dtype, temperature and iterations, which is not checked (TORCH_DISTRIBUTED_DEBUG=
    DETAIL does). B may differ, and be 0. Arguments are checked before the first exchange; a process
    that raises leaves the others waiting until the group's timeout, as in any collective. An
    all-reduce of M values prepares, and each iteration takes one more; NaN reaches every process.
    Composed of torch's operators on any device that the group serves: on CUDA without waiting for
    the device; under torch.compile(fullgraph=True) with functional collectives, one graph for each
    number of iterations; not under vmap, which is a NotImplementedError.

    Source: CRPTpro (arXiv 2302.05614), section 3; SwAV (arXiv 2006.09882), appendix A.
    """
    arguments.tensor("scores", scores)
    temperature = arguments.real("temperature", temperature)
    iterations = arguments.integer("iterations", iterations)
    if group is not None:
        arguments.process_group(group)
        if in_transform() and under_vmap(scores):
            raise NotImplementedError(
                "sinkhorn should have no group under vmap: give it leading dimensions"
            )
        checks.sinkhorn_group(scores, temperature, iterations)
        if group.size() > 1 or scores.shape[-2] == 0:
            return sinkhorn_group(scores, temperature, iterations, group)
    return call("sinkhorn", scores, temperature, iterations)


@fake("sinkhorn")
def _(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    checks.sinkhorn(scores, temperature, iterations)
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


not_differentiable("sinkhorn")
