"""The operators on CUDA tensors: check, make contiguous, allocate, start the compiled kernels.

Everything runs on the current stream and nothing waits for the device, so every operator can be
captured in a CUDA graph. GEMMs are torch.matmul, in float32 (float64 for float64), and follow
torch.set_float32_matmul_precision. AVAILABLE says whether the kernels and a torch with CUDA are
there; without them importing this file registers nothing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crpt.ops import checks, direct
from crpt.ops.conditions import compute_dtype
from crpt.ops.gemm import matmul, scaled
from crpt.ops.layout import dense_rows, memory_format


def _load() -> Any:
    """The kernels, or None where crpt was built without them or torch cannot hold CUDA tensors."""
    if torch.version.cuda is None:
        return None
    try:
        return importlib.import_module("crpt._cuda")
    except ModuleNotFoundError as error:
        if error.name != "crpt._cuda":
            raise
        return None


_cuda = _load()
AVAILABLE = _cuda is not None

# The kernels' Dtype, by number.
_DTYPE = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.uint8: 4,
}
# Scratch for the squared distances of one block of queries, in elements: 64 MiB of float32.
_SQUARES_PER_BLOCK = 1 << 24
# Within a band of rows the kernels of images count in 32 bits: kLongestRow of shift.cuh.
_LONGEST_ROW = 1 << 26


def _impl(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return direct.kernel(name, "cuda") if AVAILABLE else lambda function: function


def _stream(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream, first and last argument of every launcher."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


@_impl("sinkhorn")
def sinkhorn_cuda(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    checks.sinkhorn(scores, temperature, iterations)
    scores = scores.contiguous()  # [..., B, M]
    codes = scores.new_empty(scores.shape)
    b, m = scores.shape[-2:]
    items = scores.numel() // (b * m)
    device, stream = _stream(scores.device)
    cluster, scratch_bytes = _sinkhorn_plan(_cuda, device, _DTYPE[scores.dtype], items, b, m)
    # Nothing is allocated where the items stay on the chip.
    scratch = scores.new_empty(scratch_bytes, dtype=torch.uint8) if scratch_bytes else None
    _cuda.sinkhorn(
        device, _DTYPE[scores.dtype], scores.data_ptr(), codes.data_ptr(),
        0 if scratch is None else scratch.data_ptr(), items, b, m, temperature, iterations,
        cluster, stream,
    )  # fmt: skip
    return codes


@functools.lru_cache(maxsize=1024)
def _sinkhorn_plan(
    kernels: Any, device: int, dtype: int, items: int, batch: int, prototypes: int
) -> tuple[int, int]:
    """Blocks per item with which it stays on the chip, or 0; bytes of scratch.

    It takes some microseconds to ask the device, and the answer stays the same.
    """
    cluster, scratch_bytes = kernels.sinkhorn_plan(device, dtype, items, batch, prototypes)
    return cluster, scratch_bytes


def _row_normalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.contiguous()  # [..., R, D]
    compute = compute_dtype(rows.dtype)
    unit = rows.new_empty(rows.shape, dtype=compute)
    norm = rows.new_empty(rows.shape[:-1], dtype=compute)
    device, stream = _stream(rows.device)
    _cuda.row_normalize(
        device, _DTYPE[rows.dtype], rows.data_ptr(), unit.data_ptr(), norm.data_ptr(),
        norm.numel(), rows.shape[-1], stream,
    )  # fmt: skip
    return unit, norm


@_impl("prototype_similarity")
def prototype_similarity_cuda(embeddings: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
    checks.prototype_similarity(embeddings, prototypes)
    unit_e, norm_e = _row_normalize(embeddings)
    unit_c, norm_c = _row_normalize(prototypes)
    similarity = matmul(unit_e, unit_c.mT).to(embeddings.dtype)
    return similarity, unit_e, unit_c, norm_e, norm_c


@_impl("prototype_similarity_backward")
def prototype_similarity_backward_cuda(
    grad: Tensor, unit: Tensor, norm: Tensor, other: Tensor
) -> Tensor:
    checks.prototype_similarity_backward(grad, unit, norm, other)
    grad_unit = matmul(grad.to(unit.dtype), other).sum_to_size(unit.shape).contiguous()
    unit, norm = unit.contiguous(), norm.contiguous()
    grad_rows = unit.new_empty(unit.shape)
    device, stream = _stream(unit.device)
    _cuda.row_normalize_backward(
        device, _DTYPE[unit.dtype], grad_unit.data_ptr(), unit.data_ptr(), norm.data_ptr(),
        grad_rows.data_ptr(), norm.numel(), unit.shape[-1], stream,
    )  # fmt: skip
    return grad_rows


@_impl("prototype_loss")
def prototype_loss_cuda(
    scores: Tensor, codes: Tensor, temperature: float, of_scores: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.prototype_loss(scores, codes, temperature)
    scores, codes = scores.contiguous(), codes.contiguous()  # [..., B, M]
    loss = scores.new_empty(scores.shape[:-2])
    logsumexp = scores.new_empty(scores.shape[:-1], dtype=compute_dtype(scores.dtype))
    row_loss = torch.empty_like(logsumexp)
    b, m = scores.shape[-2:]
    device, stream = _stream(scores.device)
    _cuda.prototype_loss(
        device, _DTYPE[scores.dtype], scores.data_ptr(), codes.data_ptr(), loss.data_ptr(),
        logsumexp.data_ptr(), row_loss.data_ptr(), loss.numel(), b, m, temperature, stream,
    )  # fmt: skip
    grad_scores = logsumexp.new_empty((*loss.shape, 0))
    if of_scores:
        grad_scores = prototype_loss_backward_scores_cuda(
            torch.ones_like(loss, dtype=logsumexp.dtype), scores.to(logsumexp.dtype),
            codes.to(logsumexp.dtype), logsumexp, temperature,
        )  # fmt: skip
    return loss, logsumexp, grad_scores


@_impl("prototype_loss_backward")
def prototype_loss_backward_cuda(
    grad: Tensor, grad_scores: Tensor, scores: Tensor, codes: Tensor
) -> Tensor:
    checks.prototype_loss_backward(grad, grad_scores, scores, codes)
    return scaled(grad, grad_scores)


@_impl("prototype_loss_backward_scores")
def prototype_loss_backward_scores_cuda(
    grad: Tensor, scores: Tensor, codes: Tensor, logsumexp: Tensor, temperature: float
) -> Tensor:
    checks.prototype_loss_backward_scores(grad, scores, codes, logsumexp, temperature)
    grad, logsumexp = grad.to(logsumexp.dtype).contiguous(), logsumexp.contiguous()
    scores, codes = scores.contiguous(), codes.contiguous()
    grad_scores = scores.new_empty(scores.shape)
    b, m = scores.shape[-2:]
    device, stream = _stream(scores.device)
    _cuda.prototype_loss_backward_scores(
        device, _DTYPE[scores.dtype], grad.data_ptr(), scores.data_ptr(), codes.data_ptr(),
        logsumexp.data_ptr(), grad_scores.data_ptr(), grad.numel(), b, m, temperature, stream,
    )  # fmt: skip
    return grad_scores


@_impl("prototype_loss_backward_codes")
def prototype_loss_backward_codes_cuda(
    grad: Tensor, scores: Tensor, logsumexp: Tensor, temperature: float
) -> Tensor:
    checks.prototype_loss_backward_codes(grad, scores, logsumexp, temperature)
    grad, logsumexp = grad.to(logsumexp.dtype).contiguous(), logsumexp.contiguous()
    scores = scores.contiguous()
    grad_codes = scores.new_empty(scores.shape)
    b, m = scores.shape[-2:]
    device, stream = _stream(scores.device)
    _cuda.prototype_loss_backward_codes(
        device, _DTYPE[scores.dtype], grad.data_ptr(), scores.data_ptr(), logsumexp.data_ptr(),
        grad_codes.data_ptr(), grad.numel(), b, m, temperature, stream,
    )  # fmt: skip
    return grad_codes


@_impl("intrinsic_loss")
def intrinsic_loss_cuda(prototypes: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    checks.intrinsic_loss(prototypes, offset)
    c = prototypes.to(compute_dtype(prototypes.dtype))  # [..., M, D]
    weights = matmul(c, c.mT).contiguous()  # s, until the kernel has read it
    loss = prototypes.new_empty(c.shape[:-2])
    row_loss = c.new_empty(c.shape[:-1])
    device, stream = _stream(c.device)
    _cuda.intrinsic_loss(
        device, _DTYPE[prototypes.dtype], weights.data_ptr(), loss.data_ptr(), row_loss.data_ptr(),
        loss.numel(), c.shape[-2], offset, stream,
    )  # fmt: skip
    return loss, weights


@_impl("intrinsic_loss_backward")
def intrinsic_loss_backward_cuda(grad: Tensor, prototypes: Tensor, weights: Tensor) -> Tensor:
    checks.intrinsic_loss_backward(grad, prototypes, weights)
    c = prototypes.to(weights.dtype)
    scale = grad.to(weights.dtype)[..., None, None]
    return matmul(weights, c).mul_(scale).to(prototypes.dtype)


@_impl("prototype_objective")
def prototype_objective_cuda(
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
    unit, norm = _row_normalize(embeddings)
    c, codes = prototypes.to(compute), codes.to(compute)
    scores = matmul(unit, c.mT)  # [..., B, M]
    comparison, logsumexp, _ = prototype_loss_cuda(scores, codes, temperature, False)
    intrinsic, weights = intrinsic_loss_cuda(c, offset)
    grad_embeddings = scores.new_empty((*comparison.shape, 0))
    grad_prototypes = scores.new_empty((*comparison.shape, 0))
    if of_embeddings or of_prototypes:
        grad_scores = prototype_loss_backward_scores_cuda(
            torch.ones_like(comparison), scores, codes, logsumexp, temperature
        )
    if of_embeddings:
        grad_embeddings = prototype_similarity_backward_cuda(grad_scores, unit, norm, c)
    if of_prototypes:
        grad_prototypes = matmul(grad_scores.mT, unit)
        if intrinsic_weight > 0:
            grad_prototypes.add_(matmul(weights, c), alpha=intrinsic_weight)
    if intrinsic_weight > 0:
        loss = torch.add(comparison, intrinsic, alpha=intrinsic_weight)
    else:
        loss = comparison.clone()
    return (
        loss.to(dtype), comparison.to(dtype), intrinsic.to(dtype), grad_embeddings, grad_prototypes
    )  # fmt: skip


@_impl("prototype_objective_backward")
def prototype_objective_backward_cuda(
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


def _check_row(name: str, elements: int) -> None:
    if elements > _LONGEST_ROW:
        raise ValueError(
            f"{name} should have rows of at most {_LONGEST_ROW} elements on CUDA, got {elements}"
        )


@_impl("random_shift")
def random_shift_cuda(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    checks.random_shift(images, shifts, pad)
    out = torch.empty_like(images, memory_format=memory_format(images))
    images, planes, channels, strides = dense_rows(images)
    _check_row("images", images.shape[3] * channels)
    shifts = shifts.contiguous()
    batch, _, height, width = images.shape
    device, stream = _stream(images.device)
    _cuda.random_shift(
        device, images.element_size(), images.data_ptr(), shifts.data_ptr(), out.data_ptr(), batch,
        planes, height, width, channels, *strides[:3], pad, stream,
    )  # fmt: skip
    return out


@_impl("random_shift_backward")
def random_shift_backward_cuda(grad: Tensor, shifts: Tensor, pad: int) -> Tensor:
    checks.random_shift_backward(grad, shifts, pad)
    grad_images = torch.empty_like(grad, memory_format=memory_format(grad))
    grad, planes, channels, strides = dense_rows(grad)
    shifts = shifts.contiguous()
    batch, _, height, width = grad.shape
    _check_row("grad", grad.shape[3] * channels)
    device, stream = _stream(grad.device)
    _cuda.random_shift_backward(
        device, _DTYPE[grad.dtype], grad.data_ptr(), shifts.data_ptr(), grad_images.data_ptr(),
        batch, planes, height, width, channels, *strides[:3], pad, stream,
    )  # fmt: skip
    return grad_images


@_impl("frame_stack")
def frame_stack_cuda(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, dtype: torch.dtype
) -> Tensor:
    checks.frame_stack(frames, index, shifts, pad, dtype)
    batch, stack = index.shape
    _, channels, height, width = frames.shape
    out = frames.new_empty((batch, stack * channels, height, width), dtype=dtype)
    _frame_stack(frames, index, shifts, pad, out)
    return out


@_impl("frame_stack_out")
def frame_stack_out_cuda(
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
    _check_row("frames", frames.shape[3])
    index = index.contiguous()
    shifts = None if shifts is None else shifts.contiguous()
    device, stream = _stream(frames.device)
    # The strides of the frames go to the kernel: a copy of a store of many GB would be no help.
    _cuda.frame_stack(
        device, _DTYPE[out.dtype], frames.data_ptr(), index.data_ptr(),
        0 if shifts is None else shifts.data_ptr(), out.data_ptr(), *frames.shape,
        *frames.stride(), *index.shape, pad, stream,
    )  # fmt: skip


@_impl("knn_distance")
def knn_distance_cuda(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    checks.knn_distance(queries, keys, k)
    compute = compute_dtype(queries.dtype)
    queries, keys = queries.contiguous(), keys.contiguous()
    (batch, dim), count = queries.shape, keys.shape[0]
    distance = queries.new_empty(batch, dtype=compute)
    index = queries.new_empty(batch, dtype=torch.int64)
    block = min(batch, max(1, _SQUARES_PER_BLOCK // count))
    squares = queries.new_empty((block, count), dtype=compute)
    device, stream = _stream(queries.device)
    for begin in range(0, batch, max(1, block)):
        rows = queries[begin : begin + block]
        _cuda.knn_distance(
            device, _DTYPE[queries.dtype], rows.data_ptr(), keys.data_ptr(), squares.data_ptr(),
            distance[begin:].data_ptr(), index[begin:].data_ptr(), rows.shape[0], count, dim, k,
            stream,
        )  # fmt: skip
    return distance, index


def _knn_distance_backward(
    launcher: Any,
    like: Tensor,
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    distance: Tensor,
    index: Tensor,
) -> Tensor:
    checks.knn_distance_backward(grad, queries, keys, distance, index)
    grad = grad.to(distance.dtype).contiguous()
    queries, keys = queries.contiguous(), keys.contiguous()
    distance, index = distance.contiguous(), index.contiguous()
    out = like.new_empty(like.shape, dtype=distance.dtype)
    device, stream = _stream(queries.device)
    launcher(
        device, _DTYPE[queries.dtype], grad.data_ptr(), queries.data_ptr(), keys.data_ptr(),
        distance.data_ptr(), index.data_ptr(), out.data_ptr(), queries.shape[0], *keys.shape,
        stream,
    )  # fmt: skip
    return out


@_impl("knn_distance_backward_queries")
def knn_distance_backward_queries_cuda(
    grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor
) -> Tensor:
    launcher = _cuda.knn_distance_backward_queries
    return _knn_distance_backward(launcher, queries, grad, queries, keys, distance, index)


@_impl("knn_distance_backward_keys")
def knn_distance_backward_keys_cuda(
    grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor
) -> Tensor:
    launcher = _cuda.knn_distance_backward_keys
    return _knn_distance_backward(launcher, keys, grad, queries, keys, distance, index)
