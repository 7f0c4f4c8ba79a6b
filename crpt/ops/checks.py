"""What each operator accepts, checked in one place for every device and for the fakes.

TypeError for type and dtype, ValueError for shape, device and value; each message names the
argument, what it should be and what it was. Values inside index and shift tensors are checked by
the kernels that read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMAGES = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
STACKS = (*FLOATS, torch.uint8)
LARGEST_PAD = 2**31 - 1  # position + shift is far from overflow
# Normal numbers whose inverse is one too, of the type that each dtype is computed in.
_INVERTIBLE = {
    dtype: (2.0**-power, 2.0**power)
    for dtype, power in (
        (torch.float32, 126), (torch.float16, 126), (torch.bfloat16, 126), (torch.float64, 1022),
    )
}  # fmt: skip
MOST_ITERATIONS = 100_000  # more is a mistake, which nothing could interrupt


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sinkhorn(scores: Tensor, temperature: float, iterations: int) -> None:
    _floating("scores", scores)
    _scores_shape("scores", scores)
    _positive("temperature", temperature, scores.dtype)
    _iterations(iterations)


def sinkhorn_group(scores: Tensor, temperature: float, iterations: int) -> None:
    """The same, where a process may be without samples."""
    _floating("scores", scores)
    shape = scores.shape
    if len(shape) < 2 or not _hold(shape[-1] >= 1):
        raise ValueError(f"scores should be [..., B, M] with M >= 1, got {list(shape)}")
    _positive("temperature", temperature, scores.dtype)
    _iterations(iterations)


def prototype_similarity(embeddings: Tensor, prototypes: Tensor) -> None:
    _floating("embeddings", embeddings)
    _same_kind("prototypes", prototypes, "embeddings", embeddings)
    e, c = embeddings.shape, prototypes.shape
    if len(e) < 2 or not _hold(e[-1] >= 1):
        raise ValueError(f"embeddings should be [..., B, D] with D >= 1, got {list(e)}")
    if len(c) < 2 or not _hold(c[-2] >= 1, c[-1] == e[-1]):
        raise ValueError(f"prototypes should be [..., M, {e[-1]}] with M >= 1, got {list(c)}")
    _broadcast("prototypes", c[:-2], e[:-2])


def prototype_similarity_backward(grad: Tensor, unit: Tensor, norm: Tensor, other: Tensor) -> None:
    _computed("unit", unit)
    shape, others = unit.shape, other.shape
    if len(shape) < 2 or not _hold(shape[-1] >= 1):
        raise ValueError(f"unit should be [..., R, D] with D >= 1, got {list(shape)}")
    _is("norm", norm, shape[:-1], unit.dtype, unit.device)
    _same_kind("other", other, "unit", unit)
    if len(others) < 2 or not _hold(others[-1] == shape[-1]):
        raise ValueError(f"other should be [..., S, {shape[-1]}], got {list(others)}")
    _broadcast("other", others[:-2], shape[:-2])
    _floating("grad", grad)
    leading = torch.broadcast_shapes(shape[:-2], others[:-2])
    _is("grad", grad, (*leading, shape[-2], others[-2]), grad.dtype, unit.device)


def prototype_loss(scores: Tensor, codes: Tensor, temperature: float) -> None:
    _floating("scores", scores)
    _scores_shape("scores", scores)
    _same_kind("codes", codes, "scores", scores)
    if not _equal(codes.shape, scores.shape):
        raise ValueError(
            f"codes should be {list(scores.shape)} like scores, got {list(codes.shape)}"
        )
    _positive("temperature", temperature, scores.dtype)


def prototype_loss_backward(
    grad: Tensor, grad_scores: Tensor, scores: Tensor, codes: Tensor
) -> None:
    prototype_loss(scores, codes, 1.0)
    shape, dtype, device = scores.shape, scores.dtype, scores.device
    _is("grad", grad, shape[:-2], dtype, device)
    _is("grad_scores", grad_scores, shape, compute_dtype(dtype), device)


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
    _is("grad", grad, scores.shape[:-2], scores.dtype, scores.device)
    _is("logsumexp", logsumexp, scores.shape[:-1], compute_dtype(scores.dtype), scores.device)


def prototype_objective(
    embeddings: Tensor,
    prototypes: Tensor,
    codes: Tensor,
    temperature: float,
    intrinsic_weight: float,
    offset: float,
) -> None:
    _floating("embeddings", embeddings)
    _same_kind("prototypes", prototypes, "embeddings", embeddings)
    _same_kind("codes", codes, "embeddings", embeddings)
    e, c = embeddings.shape, prototypes.shape
    if len(e) < 2 or not _hold(e[-2] >= 1, e[-1] >= 1):
        raise ValueError(f"embeddings should be [..., B, D] with B, D >= 1, got {list(e)}")
    if len(c) < 2 or not _hold(c[-2] >= 1) or not _equal((*c[:-2], c[-1]), (*e[:-2], e[-1])):
        expected = ", ".join([*map(str, e[:-2]), "M", str(e[-1])])
        raise ValueError(f"prototypes should be [{expected}] with M >= 1, got {list(c)}")
    expected_codes = (*e[:-1], c[-2])
    if not _equal(codes.shape, expected_codes):
        raise ValueError(f"codes should be {list(expected_codes)}, got {list(codes.shape)}")
    _positive("temperature", temperature, embeddings.dtype)
    if not 0 <= intrinsic_weight < math.inf:
        raise ValueError(f"intrinsic_weight should be >= 0 and finite, got {intrinsic_weight}")
    _positive("offset", offset, embeddings.dtype)


def prototype_objective_backward(
    grad: Tensor,
    grad_embeddings: Tensor,
    grad_prototypes: Tensor,
    embeddings: Tensor,
    prototypes: Tensor,
) -> None:
    _floating("embeddings", embeddings)
    _same_kind("prototypes", prototypes, "embeddings", embeddings)
    dtype, device = embeddings.dtype, embeddings.device
    _is("grad", grad, embeddings.shape[:-2], dtype, device)
    for name, value, like in (
        ("grad_embeddings", grad_embeddings, embeddings),
        ("grad_prototypes", grad_prototypes, prototypes),
    ):
        known = len(value.shape) == len(like.shape)
        _is(name, value, like.shape if known else (*grad.shape, 0), compute_dtype(dtype), device)


def intrinsic_loss(prototypes: Tensor, offset: float) -> None:
    _floating("prototypes", prototypes)
    shape = prototypes.shape
    if len(shape) < 2 or not _hold(shape[-2] >= 1, shape[-1] >= 1):
        raise ValueError(f"prototypes should be [..., M, D] with M, D >= 1, got {list(shape)}")
    _positive("offset", offset, prototypes.dtype)


def intrinsic_loss_backward(grad: Tensor, prototypes: Tensor, weights: Tensor) -> None:
    intrinsic_loss(prototypes, 1.0)
    shape, device = prototypes.shape, prototypes.device
    square = (*shape[:-1], shape[-2])
    _is("weights", weights, square, compute_dtype(prototypes.dtype), device)
    _is("grad", grad, shape[:-2], prototypes.dtype, device)


def random_shift(images: Tensor, shifts: Tensor, pad: int) -> None:
    random_shift_images(images, pad)
    _shifts(shifts, images.shape[0], images.device)


def random_shift_images(images: Tensor, pad: int) -> None:
    """What is known before the shifts are drawn."""
    if images.dtype not in IMAGES:
        raise TypeError(f"images should be {_names(IMAGES)}, got {images.dtype}")
    _images_shape("images", images, "B")
    _pad(pad)


def random_shift_backward(grad: Tensor, shifts: Tensor, pad: int) -> None:
    _floating("grad", grad)
    _images_shape("grad", grad, "B")
    _shifts(shifts, grad.shape[0], grad.device)
    _pad(pad)


def frame_stack(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, dtype: torch.dtype
) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames should be torch.uint8, got {frames.dtype}")
    _images_shape("frames", frames, "N")
    if index.dtype != torch.int64:
        raise TypeError(f"index should be torch.int64, got {index.dtype}")
    if len(index.shape) != 2 or not _hold(index.shape[1] >= 1):
        raise ValueError(f"index should be [B, K] with K >= 1, got {list(index.shape)}")
    _same_device("index", index, frames.device)
    if shifts is not None:
        _shifts(shifts, index.shape[0], frames.device)
    _pad(pad)
    if dtype not in STACKS:
        raise TypeError(f"dtype should be {_names(STACKS)}, got {dtype}")


def frame_stack_out(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, out: Tensor
) -> None:
    if out.dtype not in STACKS:
        raise TypeError(f"out should be {_names(STACKS)}, got {out.dtype}")
    frame_stack(frames, index, shifts, pad, out.dtype)
    (batch, stack), (_, channels, height, width) = index.shape, frames.shape
    _is("out", out, (batch, stack * channels, height, width), out.dtype, frames.device)
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
    if not _hold(k >= 1, k <= keys.shape[0]):
        raise ValueError(f"k should be in [1, {keys.shape[0]}], the number of keys, got {k}")


def knn_distance_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, distance: Tensor, index: Tensor
) -> None:
    _points(queries, keys)
    batch, compute, device = queries.shape[:1], compute_dtype(queries.dtype), queries.device
    _is("grad", grad, batch, compute, device)
    _is("distance", distance, batch, compute, device)
    _is("index", index, batch, torch.int64, device)


def _points(queries: Tensor, keys: Tensor) -> None:
    _floating("queries", queries)
    _same_kind("keys", keys, "queries", queries)
    if len(queries.shape) != 2 or not _hold(queries.shape[1] >= 1):
        raise ValueError(f"queries should be [B, D] with D >= 1, got {list(queries.shape)}")
    if len(keys.shape) != 2 or not _hold(keys.shape[0] >= 1, keys.shape[1] == queries.shape[1]):
        raise ValueError(
            f"keys should be [Q, {queries.shape[1]}] with Q >= 1, got {list(keys.shape)}"
        )


# --- shared pieces ---


def _hold(*conditions: bool | torch.SymBool) -> bool:
    """Whether all hold. Of sizes that depend on data, a compiled graph asserts it as it runs."""
    for condition in conditions:
        if not isinstance(condition, bool):
            from torch.fx.experimental.symbolic_shapes import expect_true  # slow to import

            condition = expect_true(condition)
        if not condition:
            return False
    return True


def _equal(shape: Sequence[int], other: Sequence[int]) -> bool:
    if len(shape) != len(other):
        return False
    for i, j in zip(shape, other, strict=True):  # a loop: this is called several times a call
        same = i == j
        if same is not True and not _hold(same):
            return False
    return True


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} should be {_names(FLOATS)}, got {value.dtype}")


def _same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} should be on {device}, got {value.device}")


def _same_kind(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise TypeError(f"{name} should be {like.dtype} like {like_name}, got {value.dtype}")
    _same_device(name, value, like.device)


def _computed(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} should be float32 or float64, got {value.dtype}")


def _is(
    name: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name} should be {dtype}, got {value.dtype}")
    if not _equal(value.shape, shape):
        raise ValueError(f"{name} should be {list(shape)}, got {list(value.shape)}")
    _same_device(name, value, device)


def _broadcast(name: str, leading: Sequence[int], others: Sequence[int]) -> None:
    for i, j in zip(reversed(leading), reversed(others), strict=False):
        if i != j and i != 1 and j != 1:
            raise ValueError(
                f"{name} should have leading dimensions that broadcast with "
                f"{list(others)}, got {list(leading)}"
            )


def _images_shape(name: str, value: Tensor, count: str) -> None:
    shape = value.shape
    if len(shape) != 4 or not _hold(shape[1] >= 1, shape[2] >= 1, shape[3] >= 1):
        raise ValueError(
            f"{name} should be [{count}, C, H, W] with C, H, W >= 1, got {list(shape)}"
        )


def _scores_shape(name: str, value: Tensor) -> None:
    shape = value.shape
    if len(shape) < 2 or not _hold(shape[-2] >= 1, shape[-1] >= 1):
        raise ValueError(f"{name} should be [..., B, M] with B, M >= 1, got {list(shape)}")


def _shifts(shifts: Tensor, batch: int, device: torch.device) -> None:
    if shifts.dtype != torch.int64:
        raise TypeError(f"shifts should be torch.int64, got {shifts.dtype}")
    if not _equal(shifts.shape, (batch, 2)):
        raise ValueError(f"shifts should be [{batch}, 2], got {list(shifts.shape)}")
    _same_device("shifts", shifts, device)


def _iterations(iterations: int) -> None:
    _at_least("iterations", iterations, 0)
    _at_most("iterations", iterations, MOST_ITERATIONS)


def _pad(pad: int) -> None:
    _at_least("pad", pad, 0)
    _at_most("pad", pad, LARGEST_PAD)


def _positive(name: str, value: float, dtype: torch.dtype) -> None:
    """For inputs of that dtype: what divides by the value, or multiplies by its inverse, meets no
    zero and no infinity that the value itself is not."""
    least, most = _INVERTIBLE[dtype]
    if least <= value <= most:
        return
    if not 0 < value < math.inf:
        raise ValueError(f"{name} should be positive and finite, got {value}")
    compute = str(compute_dtype(dtype)).removeprefix("torch.")
    raise ValueError(
        f"{name} should be in [{least:.3g}, {most:.3g}], where {compute} holds it and its inverse, "
        f"got {value}"
    )


def _at_least(name: str, value: int, least: int) -> None:
    if not _hold(value >= least):
        raise ValueError(f"{name} should be >= {least}, got {value}")


def _at_most(name: str, value: int, most: int) -> None:
    if not _hold(value <= most):
        raise ValueError(f"{name} should be <= {most}, got {value}")
