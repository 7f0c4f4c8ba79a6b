"""What each operator accepts, checked in one place for every device and for the fakes.

TypeError for type and dtype, ValueError for shape, device and value; each message names the
argument, what it should be and what it was. Values inside index and shift tensors are checked by
the kernels that read them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMAGES = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
STACKS = (*FLOATS, torch.uint8)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sinkhorn(scores: Tensor, temperature: float, iterations: int) -> None:
    _floating("scores", scores)
    _scores_shape("scores", scores)
    _positive("temperature", temperature)
    _at_least("iterations", iterations, 0)


def prototype_similarity(embeddings: Tensor, prototypes: Tensor) -> None:
    _floating("embeddings", embeddings)
    _same_kind("prototypes", prototypes, "embeddings", embeddings)
    e, c = embeddings.shape, prototypes.shape
    if len(e) < 2 or e[-1] < 1:
        raise ValueError(f"embeddings should be [..., B, D] with D >= 1, got {list(e)}")
    if len(c) < 2 or c[-2] < 1 or c[-1] != e[-1]:
        raise ValueError(f"prototypes should be [..., M, {e[-1]}] with M >= 1, got {list(c)}")
    for i, j in zip(reversed(e[:-2]), reversed(c[:-2]), strict=False):
        if i != j and i != 1 and j != 1:
            raise ValueError(
                "prototypes should have leading dimensions that broadcast with "
                f"{list(e[:-2])}, got {list(c[:-2])}"
            )


def prototype_loss(scores: Tensor, codes: Tensor, temperature: float) -> None:
    _floating("scores", scores)
    _scores_shape("scores", scores)
    _same_kind("codes", codes, "scores", scores)
    if codes.shape != scores.shape:
        raise ValueError(
            f"codes should be {list(scores.shape)} like scores, got {list(codes.shape)}"
        )
    _positive("temperature", temperature)


def intrinsic_loss(prototypes: Tensor, offset: float) -> None:
    _floating("prototypes", prototypes)
    shape = prototypes.shape
    if len(shape) < 2 or shape[-2] < 1 or shape[-1] < 1:
        raise ValueError(f"prototypes should be [..., M, D] with M, D >= 1, got {list(shape)}")
    _positive("offset", offset)


def random_shift(images: Tensor, shifts: Tensor, pad: int) -> None:
    random_shift_images(images, pad)
    _shifts(shifts, images.shape[0], images.device)


def random_shift_images(images: Tensor, pad: int) -> None:
    """What is known before the shifts are drawn."""
    if images.dtype not in IMAGES:
        raise TypeError(f"images should be real numbers or bool, got {images.dtype}")
    shape = images.shape
    if len(shape) != 4 or shape[1] < 1 or shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"images should be [B, C, H, W] with C, H, W >= 1, got {list(shape)}")
    _at_least("pad", pad, 0)


def frame_stack(
    frames: Tensor, index: Tensor, shifts: Tensor | None, pad: int, dtype: torch.dtype
) -> None:
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames should be torch.uint8, got {frames.dtype}")
    shape = frames.shape
    if len(shape) != 4 or shape[1] < 1 or shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"frames should be [N, C, H, W] with C, H, W >= 1, got {list(shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"index should be torch.int64, got {index.dtype}")
    if len(index.shape) != 2 or index.shape[1] < 1:
        raise ValueError(f"index should be [B, K] with K >= 1, got {list(index.shape)}")
    _same_device("index", index, frames.device)
    if shifts is not None:
        _shifts(shifts, index.shape[0], frames.device)
    _at_least("pad", pad, 0)
    if dtype not in STACKS:
        raise TypeError(f"dtype should be {_names(STACKS)}, got {dtype}")


def knn_distance(queries: Tensor, keys: Tensor, k: int) -> None:
    _floating("queries", queries)
    _same_kind("keys", keys, "queries", queries)
    if len(queries.shape) != 2 or queries.shape[1] < 1:
        raise ValueError(f"queries should be [B, D] with D >= 1, got {list(queries.shape)}")
    if len(keys.shape) != 2 or keys.shape[0] < 1 or keys.shape[1] != queries.shape[1]:
        raise ValueError(
            f"keys should be [Q, {queries.shape[1]}] with Q >= 1, got {list(keys.shape)}"
        )
    if not 1 <= k <= keys.shape[0]:
        raise ValueError(f"k should be in [1, {keys.shape[0]}], the number of keys, got {k}")


# --- shared pieces ---


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


def _scores_shape(name: str, value: Tensor) -> None:
    shape = value.shape
    if len(shape) < 2 or shape[-1] < 1 or shape[-2] < 1:
        raise ValueError(f"{name} should be [..., B, M] with B, M >= 1, got {list(shape)}")


def _shifts(shifts: Tensor, batch: int, device: torch.device) -> None:
    if shifts.dtype != torch.int64:
        raise TypeError(f"shifts should be torch.int64, got {shifts.dtype}")
    if len(shifts.shape) != 2 or shifts.shape[0] != batch or shifts.shape[1] != 2:
        raise ValueError(f"shifts should be [{batch}, 2], got {list(shifts.shape)}")
    _same_device("shifts", shifts, device)


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} should be positive and finite, got {value}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} should be >= {least}, got {value}")
