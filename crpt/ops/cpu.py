"""The operators on CPU tensors: check, find or make contiguous rows, allocate, call the kernel.

GEMMs are torch.matmul, in float32 (float64 for float64), and follow
torch.set_float32_matmul_precision.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crpt.ops import checks, cpu_memory, direct
from crpt.ops.compiled import _cpu
from crpt.ops.conditions import compute_dtype
from crpt.ops.gemm import matmul, scaled
from crpt.ops.layout import memory_format, pixel_planes

# The kernels' DType, by index.
_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# Scratch for the dot products of one block of queries: about what the caches hold.
_DOTS_PER_BLOCK = 1 << 20


_impl = functools.partial(direct.kernel, device="cpu")


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., D] as contiguous rows, and how far it is from each to the next, in elements: copied
    only where they are not contiguous or not all equally far apart."""
    if x.is_contiguous():
        return x, x.shape[-1]
    shape, stride = x.shape, x.stride()
    if stride[-1] == 1 and all(
        stride[i] == shape[i + 1] * stride[i + 1] for i in range(len(shape) - 2)
    ):
        return x, stride[-2]
    return x.contiguous(), shape[-1]


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """On the CPU whatever torch's default device is: modes do not reach into operators."""
    return torch.empty(shape, dtype=dtype)


@_impl("sinkhorn")
def sinkhorn_cpu(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    checks.sinkhorn(scores, temperature, iterations)
    scores, stride = _rows(scores)  # [..., B, M]
    codes = cpu_memory.new_empty(scores, scores.shape)
    b, m = scores.shape[-2:]
    _cpu.sinkhorn(
        scores.data_ptr(), stride, codes.data_ptr(), _DTYPE[scores.dtype],
        scores.numel() // (b * m), b, m, temperature, iterations, torch.get_num_threads(),
    )  # fmt: skip
    return codes


@_impl("prototype_similarity")
def prototype_similarity_cpu(embeddings: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    checks.prototype_similarity(embeddings, prototypes)
    dtype, compute = embeddings.dtype, compute_dtype(embeddings.dtype)
    (e, stride_e), (c, stride_c) = _rows(embeddings), _rows(prototypes)  # [..., B, D], [..., M, D]
    unit_e, norm_e = _empty(e.shape, compute), _empty(e.shape[:-1], compute)
    unit_c, norm_c = _empty(c.shape, compute), _empty(c.shape[:-1], compute)
    _cpu.row_normalize_both(
        e.data_ptr(), stride_e, unit_e.data_ptr(), norm_e.data_ptr(), norm_e.numel(),
        c.data_ptr(), stride_c, unit_c.data_ptr(), norm_c.data_ptr(), norm_c.numel(),
        _DTYPE[dtype], e.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    similarity = matmul(unit_e, unit_c.mT)
    return _to(similarity, dtype), unit_e, unit_c, norm_e, norm_c


@_impl("prototype_similarity_backward")
def prototype_similarity_backward_cpu(
    grad: Tensor, unit: Tensor, norm: Tensor, other: Tensor
) -> Tensor:
    checks.prototype_similarity_backward(grad, unit, norm, other)
    grad_unit = matmul(grad.to(unit.dtype), other).sum_to_size(unit.shape)
    return _row_normalize_backward(grad_unit, unit, norm)


def _row_normalize_backward(grad_unit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    grad_unit, unit, norm = _contiguous(grad_unit), _contiguous(unit), _contiguous(norm)
    grad_rows = _empty(unit.shape, unit.dtype)
    _cpu.row_normalize_backward(
        grad_unit.data_ptr(), unit.data_ptr(), norm.data_ptr(), grad_rows.data_ptr(),
        _DTYPE[unit.dtype], norm.numel(), unit.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    return grad_rows


@_impl("prototype_loss")
def prototype_loss_cpu(
    scores: Tensor, codes: Tensor, temperature: float, of_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.prototype_loss(scores, codes, temperature)
    (scores, score_stride), (codes, code_stride) = _rows(scores), _rows(codes)  # [..., B, M]
    compute, (*leading, b, m) = compute_dtype(scores.dtype), scores.shape
    loss, logsumexp = _empty(leading, scores.dtype), _empty((*leading, b), compute)
    grad_scores = cpu_memory.new_empty(
        scores, scores.shape if of_scores else (*leading, 0), compute
    )
    _cpu.prototype_loss(
        scores.data_ptr(), score_stride, codes.data_ptr(), code_stride, loss.data_ptr(),
        logsumexp.data_ptr(), grad_scores.data_ptr() if of_scores else 0, _DTYPE[scores.dtype],
        loss.numel(), b, m, temperature, torch.get_num_threads(),
    )  # fmt: skip
    return loss, logsumexp, grad_scores


@_impl("prototype_loss_backward")
def prototype_loss_backward_cpu(
    grad: Tensor, grad_scores: Tensor, scores: Tensor, codes: Tensor
) -> Tensor:
    checks.prototype_loss_backward(grad, grad_scores, scores, codes)
    out = cpu_memory.new_empty(scores, scores.shape)
    scale = grad if grad.dim() == 0 else grad[..., None, None]
    return torch.mul(grad_scores, scale, out=out)


def _prototype_loss_backward(
    grad: Tensor, scores: Tensor, codes: Tensor | None, logsumexp: Tensor, temperature: float
) -> Tensor:
    grad, logsumexp = grad.contiguous(), logsumexp.contiguous()
    scores, score_stride = _rows(scores)
    codes, code_stride = (None, 0) if codes is None else _rows(codes)
    grad_input = cpu_memory.new_empty(scores, scores.shape)
    b, m = scores.shape[-2:]
    _cpu.prototype_loss_backward(
        grad.data_ptr(), scores.data_ptr(), score_stride, 0 if codes is None else codes.data_ptr(),
        code_stride, logsumexp.data_ptr(), grad_input.data_ptr(), _DTYPE[scores.dtype],
        grad.numel(), b, m, temperature, torch.get_num_threads(),
    )  # fmt: skip
    return grad_input


@_impl("prototype_loss_backward_scores")
def prototype_loss_backward_scores_cpu(
    grad: Tensor, scores: Tensor, codes: Tensor, logsumexp: Tensor, temperature: float
) -> Tensor:
    checks.prototype_loss_backward_scores(grad, scores, codes, logsumexp, temperature)
    return _prototype_loss_backward(grad, scores, codes, logsumexp, temperature)


@_impl("prototype_loss_backward_codes")
def prototype_loss_backward_codes_cpu(
    grad: Tensor, scores: Tensor, logsumexp: Tensor, temperature: float
) -> Tensor:
    checks.prototype_loss_backward_codes(grad, scores, logsumexp, temperature)
    return _prototype_loss_backward(grad, scores, None, logsumexp, temperature)


@_impl("intrinsic_loss")
def intrinsic_loss_cpu(prototypes: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    checks.intrinsic_loss(prototypes, offset)
    c = _to(prototypes, compute_dtype(prototypes.dtype))  # [..., M, D]
    weights = _contiguous(matmul(c, c.mT))  # s, until the kernel has read it
    loss = _empty(c.shape[:-2], c.dtype)
    _cpu.intrinsic_loss(
        weights.data_ptr(), loss.data_ptr(), _DTYPE[c.dtype], loss.numel(), c.shape[-2], offset,
        torch.get_num_threads(),
    )  # fmt: skip
    return _to(loss, prototypes.dtype), weights


@_impl("intrinsic_loss_backward")
def intrinsic_loss_backward_cpu(grad: Tensor, prototypes: Tensor, weights: Tensor) -> Tensor:
    checks.intrinsic_loss_backward(grad, prototypes, weights)
    product = matmul(weights, _to(prototypes, weights.dtype))
    if grad.dim() > 0 or grad.item() != 1:
        scale = _to(grad, weights.dtype)
        product.mul_(scale if scale.dim() == 0 else scale[..., None, None])
    return _to(product, prototypes.dtype)


@_impl("prototype_objective")
def prototype_objective_cpu(
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
    dtype, compute = embeddings.dtype, compute_dtype(embeddings.dtype)
    (*leading, b, d), m = embeddings.shape, prototypes.shape[-2]
    embeddings, embedding_stride = _rows(embeddings)
    prototypes, prototype_stride = _rows(prototypes)
    codes, code_stride = _rows(_to(codes, compute))
    rows, norm = _empty((*leading, b + m, d), compute), _empty((*leading, b), compute)
    threads = torch.get_num_threads()
    _cpu.prototype_objective_rows(
        embeddings.data_ptr(), embedding_stride, prototypes.data_ptr(), prototype_stride,
        rows.data_ptr(), norm.data_ptr(), _DTYPE[dtype], norm.numel() // b, b, m, d, threads,
    )  # fmt: skip
    c = rows.narrow(-2, b, m)
    products = _contiguous(matmul(rows, c.mT))  # [..., B + M, M]: s C^T, and below it C C^T
    loss, comparison, intrinsic = (_empty(leading, dtype) for _ in range(3))
    _cpu.prototype_objective(
        products.data_ptr(), codes.data_ptr(), code_stride, loss.data_ptr(), comparison.data_ptr(),
        intrinsic.data_ptr(), _DTYPE[dtype], loss.numel(), b, m, temperature, intrinsic_weight,
        offset, threads,
    )  # fmt: skip
    # In the place of the products now are G, the gradient of s C^T, and below it w W.
    grad_e = grad_c = _empty((*leading, 0), compute)
    if of_embeddings:
        grad_s = matmul(products.narrow(-2, 0, b), c)
        grad_e = _row_normalize_backward(grad_s, rows.narrow(-2, 0, b), norm)
    if of_prototypes:
        # G^T s + w W C (W is symmetric), each a sum of its own: one over B + M ends with the larger
        # error.
        grad_c = matmul(products.narrow(-2, 0, b).mT, rows.narrow(-2, 0, b))
        if intrinsic_weight > 0:
            grad_c.add_(matmul(products.narrow(-2, b, m), c))
    if grad_e is grad_c:
        grad_c = _empty((*leading, 0), compute)
    return loss, comparison, intrinsic, grad_e, grad_c


@_impl("prototype_objective_backward")
def prototype_objective_backward_cpu(
    grad: Tensor,
    grad_embeddings: Tensor,
    grad_prototypes: Tensor,
    embeddings: Tensor,
    prototypes: Tensor,
) -> tuple[Tensor, Tensor]:
    checks.prototype_objective_backward(
        grad, grad_embeddings, grad_prototypes, embeddings, prototypes
    )
    return scaled(grad, grad_embeddings), scaled(grad, grad_prototypes)


@_impl("random_shift")
def random_shift_cpu(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    checks.random_shift(images, shifts, pad)
    out = cpu_memory.empty_like(images, memory_format(images))
    images, planes, channels, strides = pixel_planes(images)
    shifts = shifts.contiguous()
    batch, _, height, width = images.shape
    _cpu.random_shift(
        images.data_ptr(), strides, out.data_ptr(), shifts.data_ptr(), batch, planes, height, width,
        channels, images.element_size(), pad, torch.get_num_threads(),
    )  # fmt: skip
    return out


@_impl("random_shift_backward")
def random_shift_backward_cpu(grad: Tensor, shifts: Tensor, pad: int) -> Tensor:
    checks.random_shift_backward(grad, shifts, pad)
    grad_images = cpu_memory.empty_like(grad, memory_format(grad))
    grad, planes, channels, strides = pixel_planes(grad)
    shifts = shifts.contiguous()
    batch, _, height, width = grad.shape
    _cpu.random_shift_backward(
        grad.data_ptr(), strides, grad_images.data_ptr(), shifts.data_ptr(), _DTYPE[grad.dtype],
        batch, planes, height, width, channels, pad, torch.get_num_threads(),
    )  # fmt: skip
    return grad_images


@_impl("frame_stack")
def frame_stack_cpu(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, dtype: torch.dtype
) -> Tensor:
    checks.frame_stack(frames, index, shifts, pad, dtype)
    batch, stack = index.shape
    _, channels, height, width = frames.shape
    out = cpu_memory.new_empty(frames, (batch, stack * channels, height, width), dtype)
    _frame_stack(frames, index, shifts, pad, out)
    return out


@_impl("frame_stack_out")
def frame_stack_out_cpu(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, out: Tensor
) -> None:
    checks.frame_stack_out(frames, index, shifts, pad, out)
    checks.no_overlap("out", out, {"frames": frames, "index": index, "shifts": shifts})
    _frame_stack(frames, index, shifts, pad, out)
    torch.autograd.graph.increment_version(out)


def _frame_stack(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, out: Tensor
) -> None:
    checks.some_frames(frames, index)
    index = index.contiguous()
    shifts = None if shifts is None else shifts.contiguous()
    # The strides of the frames go to the kernel: a copy of a store of many GB would be no help.
    _cpu.frame_stack(
        frames.data_ptr(), frames.shape, frames.stride(), index.data_ptr(), *index.shape,
        0 if shifts is None else shifts.data_ptr(), pad, out.data_ptr(), out.element_size(),
        _DTYPE.get(out.dtype, 0), torch.get_num_threads(),
    )  # fmt: skip


def _rounds_inputs() -> bool:
    """Whether torch may take float32 GEMMs in a lower precision."""
    mkldnn: Any = torch.backends.mkldnn
    try:  # the newer setting, which also knows what the older one was told
        return mkldnn.matmul.fp32_precision not in ("none", "ieee")
    except AttributeError:  # torch < 2.9
        return torch.get_float32_matmul_precision() != "highest"


def _dot_tolerance(dtype: torch.dtype, dim: int) -> float:
    """What knn_distance needs to know of the errors of dot products and its own: knn_distance.h."""
    tolerance = 2 * (dim + 8) * torch.finfo(dtype).eps  # whatever the order of the GEMM's sums
    if dtype == torch.float32 and _rounds_inputs():
        tolerance += torch.finfo(torch.bfloat16).eps  # its inputs may be rounded, its sums are not
    return tolerance


@_impl("knn_distance")
def knn_distance_cpu(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    checks.knn_distance(queries, keys, k)
    compute, threads = compute_dtype(queries.dtype), torch.get_num_threads()
    (queries, query_stride), (keys, key_stride) = _rows(queries), _rows(keys)
    (batch, dim), count = queries.shape, keys.shape[0]
    kind, tolerance = _DTYPE[queries.dtype], _dot_tolerance(compute, dim)
    distance = queries.new_empty(batch, dtype=compute)
    index = queries.new_empty(batch, dtype=torch.int64)
    near_queries = queries.new_empty(queries.shape, dtype=compute)  # to the mean of the keys, which
    near_keys = keys.new_empty(keys.shape, dtype=compute)  # becomes the origin
    norms = queries.new_empty(batch + count, dtype=compute)
    query_norms, half_key_norms = norms[:batch], norms[batch:]
    _cpu.knn_center(
        queries.data_ptr(), query_stride, keys.data_ptr(), key_stride, near_queries.data_ptr(),
        near_keys.data_ptr(), query_norms.data_ptr(), half_key_norms.data_ptr(), kind, batch, count,
        dim, threads,
    )  # fmt: skip
    block = max(1, _DOTS_PER_BLOCK // count)
    for begin in range(0, batch, block):
        rows = slice(begin, begin + block)
        dots = matmul(near_queries[rows], near_keys.mT).contiguous()  # [block, Q]
        _cpu.knn_distance(
            queries[rows].data_ptr(), query_stride, keys.data_ptr(), key_stride, dots.data_ptr(),
            query_norms[rows].data_ptr(), half_key_norms.data_ptr(), distance[rows].data_ptr(),
            index[rows].data_ptr(), kind, dots.shape[0], count, dim, k, tolerance, threads,
        )  # fmt: skip
    return distance, index


def _knn_distance_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor, *, of_keys: bool
) -> Tensor:
    checks.knn_distance_backward(grad, queries, keys, distance, index)
    compute = distance.dtype
    grad, distance, index = grad.contiguous(), distance.contiguous(), index.contiguous()
    queries, query_stride = _rows(_to(queries, compute))
    keys, key_stride = _rows(_to(keys, compute))
    out = distance.new_empty(keys.shape if of_keys else queries.shape)
    _cpu.knn_distance_backward(
        grad.data_ptr(), queries.data_ptr(), query_stride, keys.data_ptr(), key_stride,
        distance.data_ptr(), index.data_ptr(), 0 if of_keys else out.data_ptr(),
        out.data_ptr() if of_keys else 0, _DTYPE[compute], queries.shape[0], keys.shape[0],
        keys.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return out


@_impl("knn_distance_backward_queries")
def knn_distance_backward_queries_cpu(
    grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor
) -> Tensor:
    return _knn_distance_backward(grad, queries, keys, distance, index, of_keys=False)


@_impl("knn_distance_backward_keys")
def knn_distance_backward_keys_cpu(
    grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor
) -> Tensor:
    return _knn_distance_backward(grad, queries, keys, distance, index, of_keys=True)
