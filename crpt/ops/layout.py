"""How images lie in memory, for operators that keep the layout they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_planes(images: Tensor) -> tuple[Tensor, int, int]:
    """images [B, C, H, W] as B * planes planes of H * W pixels of `channels` elements each.

    Channels-last images are one plane of C-element pixels and stay channels-last; all others are C
    planes of single elements, made contiguous where they are not. Returns (images, planes,
    channels).
    """
    if images.is_contiguous():
        return images, images.shape[1], 1
    if images.is_contiguous(memory_format=torch.channels_last):
        return images, 1, images.shape[1]
    return images.contiguous(), images.shape[1], 1
