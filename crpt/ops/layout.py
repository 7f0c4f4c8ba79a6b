"""How images lie in memory, for operators that keep the layout they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(images: Tensor) -> bool:
    """Whether the channels of a pixel lie nearer to each other than pixels do."""
    if images.is_contiguous():
        return False
    _, channel, _, pixel = images.stride()
    return 0 < channel < pixel and images.shape[1] > 1


def memory_format(images: Tensor) -> torch.memory_format:
    """That of results that keep the layout of the images."""
    return torch.channels_last if is_channels_last(images) else torch.contiguous_format


def pixel_planes(images: Tensor) -> tuple[Tensor, int, int, tuple[int, ...]]:
    """images [B, C, H, W] as B * planes planes of H * W pixels of `channels` elements side by side.

    Channels-last images are one plane of C-element pixels, all others are C planes of single
    elements. Copied only where they are channels-last with something between the channels of a
    pixel. Returns (images, planes, channels, strides), these in elements: from image to image,
    plane to plane, row to row and pixel to pixel.
    """
    if not is_channels_last(images):
        return images, images.shape[1], 1, images.stride()
    if images.stride(1) != 1:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, 1, images.shape[1], images.stride()


def dense_rows(images: Tensor) -> tuple[Tensor, int, int, tuple[int, ...]]:
    """The same, copied also where the pixels of a row do not lie side by side."""
    planes = pixel_planes(images)
    channels, strides = planes[2:]
    if strides[3] == channels:
        return planes
    return pixel_planes(images.contiguous(memory_format=memory_format(images)))
