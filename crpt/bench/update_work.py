"""What an update of pre-training cannot do without: operations and bytes."""

from __future__ import annotations

import torch

_STRIDES = (2, 1, 1, 1)
_CHANNELS = 32


def sizes(image_size: int = 84) -> list[int]:
    """Height of the image, and of every layer's result."""
    found = [image_size]
    for stride in _STRIDES:
        found.append((found[-1] - 3) // stride + 1)
    return found


def flops(batch: int, image_size: int = 84, projection_dim: int = 128) -> int:
    """Of the convolutions and the projector in one update: forward of both encoders, and backward
    of one, for weights and for inputs but the pixels. What else there is, is less than 1%."""
    layers, channels = [], 9
    found = sizes(image_size)
    for size in found[1:]:
        layers.append(2 * size**2 * _CHANNELS * channels * 9)
        channels = _CHANNELS
    forward = sum(layers) + 2 * _CHANNELS * found[-1] ** 2 * projection_dim
    return batch * (4 * forward - layers[0])


def moved(batch: int, dtype: torch.dtype, image_size: int = 84, projection_dim: int = 128) -> int:
    """Bytes, if every layer is one pass over memory that fuses all it can: frames read once a view;
    of both encoders every layer's result written, and read by the next; of one, results read again
    and their gradients written and read once; weights, moments and moving average of the projector
    read and written by Adam."""
    found = sizes(image_size)
    results = sum(_CHANNELS * size**2 for size in found[1:]) * dtype.itemsize
    pixels = 9 * image_size**2
    weights = 4 * _CHANNELS * found[-1] ** 2 * projection_dim
    # Adam reads weight, gradient and two moments, and writes three; the average reads two and
    # writes one.
    return batch * (2 * pixels + 7 * results) + 10 * weights
