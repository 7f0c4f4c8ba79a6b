from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crpt.ops import arguments, checks
from crpt.ops.autograd import call, differentiable_once, fake, gradient
from crpt.ops.conditions import compute_dtype


def knn_distance(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    r"""Distance of each query to its k-th nearest key.

    .. math::
        distance_b = \operatorname{k-th\ smallest}_q |queries_b - keys_q|

    The distance is taken from the vectors themselves, so that it is exact also for keys nearly
    equal to the query; on a CPU a matrix product narrows the search first. No [B, Q, D] temporary,
    at most one block of [B, Q].

    Args:
        queries: [B, D], D >= 1; float32, float16, bfloat16 or float64. B may be 0.
        keys: [Q, D], Q >= 1, dtype and device of the queries.
        k: in [1, Q]; 1 is the nearest.

    Returns:
        distance [B] in the dtype of the queries, computed in float32 (float64 for float64). NaN
        counts as farther than everything. Differentiable, once: the gradient is (query - key) /
        distance, 0 where the distance is 0.

    Raises:
        TypeError: type or dtype.
        ValueError: shape, device or k.

    Source: the intrinsic reward of CRPTpro (arXiv 2302.05614), section 3; Proto-RL (arXiv
        2102.11271).
    """
    queries, keys = arguments.pair(("queries", "keys"), queries, keys)
    return call("knn_distance", queries, keys, arguments.integer("k", k))[0].to(queries.dtype)


@fake("knn_distance")
def _(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    checks.knn_distance(queries, keys, k)
    batch = queries.shape[0]
    return (
        queries.new_empty(batch, dtype=compute_dtype(queries.dtype)),
        queries.new_empty(batch, dtype=torch.int64),
    )


@fake("knn_distance_backward_queries")
def _(grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor) -> Tensor:
    checks.knn_distance_backward(grad, queries, keys, distance, index)
    return queries.new_empty(queries.shape, dtype=distance.dtype)


@fake("knn_distance_backward_keys")
def _(grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor) -> Tensor:
    checks.knn_distance_backward(grad, queries, keys, distance, index)
    return keys.new_empty(keys.shape, dtype=distance.dtype)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    saved = ctx.saved_tensors
    dtype = saved[0].dtype
    wants_queries, wants_keys = ctx.needs_input_grad[:2]
    return (
        call("knn_distance_backward_queries", grad, *saved).to(dtype) if wants_queries else None,
        call("knn_distance_backward_keys", grad, *saved).to(dtype) if wants_keys else None,
        None,
    )


gradient("knn_distance", _backward, _setup)
differentiable_once("knn_distance_backward_queries")
differentiable_once("knn_distance_backward_keys")
