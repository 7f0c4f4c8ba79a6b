"""What each operator accepts, checked in one place for every device and for the fakes.

TypeError for type and dtype, ValueError for shape, device and value; each message names the
argument, what it should be and what it was. Values inside index and shift tensors are checked by
the kernels that read them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crpt.ops.conditions import (
    IMAGES,
    STACKS,
    compute_dtype,
    equal,
    hold,
    names_of,
    require,
    require_broadcast,
    require_computed,
    require_floating,
    require_images_shape,
    require_iterations,
    require_pad,
    require_positive,
    require_same_device,
    require_same_kind,
    require_scores_shape,
    require_shifts,
)


def sinkhorn(scores: Tensor, temperature: float, iterations: int) -> None:
    require_floating("scores", scores)
    require_scores_shape("scores", scores)
    require_positive("temperature", temperature, scores.dtype)
    require_iterations(iterations)


def sinkhorn_group(scores: Tensor, temperature: float, iterations: int) -> None:
    """The same, where a process may be without samples."""
    require_floating("scores", scores)
    shape = scores.shape
    if len(shape) < 2 or not hold(shape[-1] >= 1):
        raise ValueError(f"scores should be [..., B, M] with M >= 1, got {list(shape)}")
    require_positive("temperature", temperature, scores.dtype)
    require_iterations(iterations)


def prototype_similarity(embeddings: Tensor, prototypes: Tensor) -> None:
    require_floating("embeddings", embeddings)
    require_same_kind("prototypes", prototypes, "embeddings", embeddings)
    e, c = embeddings.shape, prototypes.shape
    if len(e) < 2 or not hold(e[-1] >= 1):
        raise ValueError(f"embeddings should be [..., B, D] with D >= 1, got {list(e)}")
    if len(c) < 2 or not hold(c[-2] >= 1, c[-1] == e[-1]):
        raise ValueError(f"prototypes should be [..., M, {e[-1]}] with M >= 1, got {list(c)}")
    require_broadcast("prototypes", c[:-2], e[:-2])


def prototype_similarity_backward(grad: Tensor, unit: Tensor, norm: Tensor, other: Tensor) -> None:
    require_computed("unit", unit)
    shape, others = unit.shape, other.shape
    if len(shape) < 2 or not hold(shape[-1] >= 1):
        raise ValueError(f"unit should be [..., R, D] with D >= 1, got {list(shape)}")
    require("norm", norm, shape[:-1], unit.dtype, unit.device)
    require_same_kind("other", other, "unit", unit)
    if len(others) < 2 or not hold(others[-1] == shape[-1]):
        raise ValueError(f"other should be [..., S, {shape[-1]}], got {list(others)}")
    require_broadcast("other", others[:-2], shape[:-2])
    require_floating("grad", grad)
    leading = torch.broadcast_shapes(shape[:-2], others[:-2])
    require("grad", grad, (*leading, shape[-2], others[-2]), grad.dtype, unit.device)


def prototype_loss(scores: Tensor, codes: Tensor, temperature: float) -> None:
    require_floating("scores", scores)
    require_scores_shape("scores", scores)
    require_same_kind("codes", codes, "scores", scores)
    if not equal(codes.shape, scores.shape):
        raise ValueError(
            f"codes should be {list(scores.shape)} like scores, got {list(codes.shape)}"
        )
    require_positive("temperature", temperature, scores.dtype)


def prototype_loss_backward(
    grad: Tensor, grad_scores: Tensor, scores: Tensor, codes: Tensor
) -> None:
    prototype_loss(scores, codes, 1.0)
    shape, dtype, device = scores.shape, scores.dtype, scores.device
    require("grad", grad, shape[:-2], dtype, device)
    require("grad_scores", grad_scores, shape, compute_dtype(dtype), device)


def prototype_loss_backward_scores(
    grad: Tensor, scores: Tensor, codes: Tensor, logsumexp: Tensor, temperature: float
) -> None:
    prototype_loss(scores, codes, temperature)
    _prototype_loss_results(grad, scores, logsumexp)


def prototype_loss_backward_codes(
    grad: Tensor, scores: Tensor, logsumexp: Tensor, temperature: float
) -> None:
    prototype_loss(scores, scores, temperature)
    _prototype_loss_results(grad, scores, logsumexp)


def _prototype_loss_results(grad: Tensor, scores: Tensor, logsumexp: Tensor) -> None:
    require("grad", grad, scores.shape[:-2], scores.dtype, scores.device)
    require("logsumexp", logsumexp, scores.shape[:-1], compute_dtype(scores.dtype), scores.device)


def prototype_objective(
    embeddings: Tensor,
    prototypes: Tensor,
    codes: Tensor,
    temperature: float,
    intrinsic_weight: float,
    offset: float,
) -> None:
    require_floating("embeddings", embeddings)
    require_same_kind("prototypes", prototypes, "embeddings", embeddings)
    require_same_kind("codes", codes, "embeddings", embeddings)
    e, c = embeddings.shape, prototypes.shape
    if len(e) < 2 or not hold(e[-2] >= 1, e[-1] >= 1):
        raise ValueError(f"embeddings should be [..., B, D] with B, D >= 1, got {list(e)}")
    if len(c) < 2 or not hold(c[-2] >= 1) or not equal((*c[:-2], c[-1]), (*e[:-2], e[-1])):
        expected = ", ".join([*map(str, e[:-2]), "M", str(e[-1])])
        raise ValueError(f"prototypes should be [{expected}] with M >= 1, got {list(c)}")
    expected_codes = (*e[:-1], c[-2])
    if not equal(codes.shape, expected_codes):
        raise ValueError(f"codes should be {list(expected_codes)}, got {list(codes.shape)}")
    require_positive("temperature", temperature, embeddings.dtype)
    if not 0 <= intrinsic_weight < math.inf:
        raise ValueError(f"intrinsic_weight should be >= 0 and finite, got {intrinsic_weight}")
    require_positive("offset", offset, embeddings.dtype)


def prototype_objective_backward(
    grad: Tensor,
    grad_embeddings: Tensor,
    grad_prototypes: Tensor,
    embeddings: Tensor,
    prototypes: Tensor,
) -> None:
    require_floating("embeddings", embeddings)
    require_same_kind("prototypes", prototypes, "embeddings", embeddings)
    dtype, device = embeddings.dtype, embeddings.device
    require("grad", grad, embeddings.shape[:-2], dtype, device)
    for name, value, like in (
        ("grad_embeddings", grad_embeddings, embeddings),
        ("grad_prototypes", grad_prototypes, prototypes),
    ):
        known = len(value.shape) == len(like.shape)
        shape = like.shape if known else (*grad.shape, 0)
        require(name, value, shape, compute_dtype(dtype), device)


def intrinsic_loss(prototypes: Tensor, offset: float) -> None:
    require_floating("prototypes", prototypes)
    shape = prototypes.shape
    if len(shape) < 2 or not hold(shape[-2] >= 1, shape[-1] >= 1):
        raise ValueError(f"prototypes should be [..., M, D] with M, D >= 1, got {list(shape)}")
    require_positive("offset", offset, prototypes.dtype)


def intrinsic_loss_backward(grad: Tensor, prototypes: Tensor, weights: Tensor) -> None:
    intrinsic_loss(prototypes, 1.0)
    shape, device = prototypes.shape, prototypes.device
    square = (*shape[:-1], shape[-2])
    require("weights", weights, square, compute_dtype(prototypes.dtype), device)
    require("grad", grad, shape[:-2], prototypes.dtype, device)


def random_shift(images: Tensor, shifts: Tensor, pad: int) -> None:
    random_shift_images(images, pad)
    require_shifts(shifts, images.shape[0], images.device)


def random_shift_images(images: Tensor, pad: int) -> None:
    """What is known before the shifts are drawn."""
    if images.dtype not in IMAGES:
        raise TypeError(f"images should be {names_of(IMAGES)}, got {images.dtype}")
    require_images_shape("images", images, "B")
    require_pad(pad)


def random_shift_backward(grad: Tensor, shifts: Tensor, pad: int) -> None:
    require_floating("grad", grad)
    require_images_shape("grad", grad, "B")
    require_shifts(shifts, grad.shape[0], grad.device)
    require_pad(pad)


def frame_stack(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, dtype: torch.dtype
) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames should be torch.uint8, got {frames.dtype}")
    require_images_shape("frames", frames, "N")
    if index.dtype != torch.int64:
        raise TypeError(f"index should be torch.int64, got {index.dtype}")
    if len(index.shape) != 2 or not hold(index.shape[1] >= 1):
        raise ValueError(f"index should be [B, K] with K >= 1, got {list(index.shape)}")
    require_same_device("index", index, frames.device)
    if shifts is not None:
        require_shifts(shifts, index.shape[0], frames.device)
    require_pad(pad)
    if dtype not in STACKS:
        raise TypeError(f"dtype should be {names_of(STACKS)}, got {dtype}")


def frame_stack_out(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, out: Tensor
) -> None:
    if out.dtype not in STACKS:
        raise TypeError(f"out should be {names_of(STACKS)}, got {out.dtype}")
    frame_stack(frames, index, shifts, pad, out.dtype)
    (batch, stack), (_, channels, height, width) = index.shape, frames.shape
    require("out", out, (batch, stack * channels, height, width), out.dtype, frames.device)
    if not out.is_contiguous():
        raise ValueError(f"out should be contiguous, got strides {list(out.stride())}")
    if out.requires_grad:
        raise ValueError("out should not require a gradient: frame_stack has none")


def some_frames(frames: Tensor, index: Tensor) -> None:
    """Of real tensors: whatever the index names, a store without frames has none of it."""
    if frames.shape[0] == 0 and index.shape[0] > 0:
        raise ValueError(
            "frames should be [N, C, H, W] with N >= 1 where index has rows, "
            f"got {list(frames.shape)}"
        )


def no_overlap(name: str, out: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Of real tensors: no byte of `out`, which is contiguous, lies within another's extent."""
    begin, end = _extent(out)
    for other, value in inputs.items():
        if value is not None:
            first, last = _extent(value)
            if begin < last and first < end:
                raise ValueError(f"{name} should not overlap {other} in memory")


def _extent(value: Tensor) -> tuple[int, int]:
    begin = value.data_ptr()
    if value.numel() == 0:
        return begin, begin
    pairs = zip(value.shape, value.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in pairs)
    return begin, begin + count * value.element_size()


def knn_distance(queries: Tensor, keys: Tensor, k: int) -> None:
    _points(queries, keys)
    if not hold(k >= 1, k <= keys.shape[0]):
        raise ValueError(f"k should be in [1, {keys.shape[0]}], the number of keys, got {k}")


def knn_distance_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor
) -> None:
    _points(queries, keys)
    batch, compute, device = queries.shape[:1], compute_dtype(queries.dtype), queries.device
    require("grad", grad, batch, compute, device)
    require("distance", distance, batch, compute, device)
    require("index", index, batch, torch.int64, device)


def _points(queries: Tensor, keys: Tensor) -> None:
    require_floating("queries", queries)
    require_same_kind("keys", keys, "queries", queries)
    if len(queries.shape) != 2 or not hold(queries.shape[1] >= 1):
        raise ValueError(f"queries should be [B, D] with D >= 1, got {list(queries.shape)}")
    if len(keys.shape) != 2 or not hold(keys.shape[0] >= 1, keys.shape[1] == queries.shape[1]):
        raise ValueError(
            f"keys should be [Q, {queries.shape[1]}] with Q >= 1, got {list(keys.shape)}"
        )
