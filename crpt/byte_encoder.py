"""The encoder in training in bf16: from bytes to embeddings by kernels of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crpt.encoder import Encoder
from crpt.ops.conv_features import channels_last_columns, conv_features, usable


def bytes_are_faster(encoder: Encoder, device: torch.device) -> bool:
    """Whether `project_bytes` is for this encoder and device."""
    return usable(encoder.convolutions, encoder.config.image_size, device)


def project_bytes(encoder: Encoder, images: Tensor) -> Tensor:
    """norm(g(f(images / 255))), uint8 [B, C, H, W] -> float32 [B, D]; f and g in bf16."""
    h = conv_features(images, encoder.convolutions)  # [B, H', W', 32]
    g = encoder.projector
    # Its columns in the order in which h lies, rather than h in that of the columns: h is larger.
    weight = channels_last_columns(g.weight, h.shape[-1])
    bias = None if g.bias is None else g.bias.to(h.dtype)
    projected: Tensor = encoder.norm(F.linear(h.flatten(1), weight, bias).float())
    return projected


def pixels_of(views: Tensor, dtype: torch.dtype) -> Tensor:
    """In [0, 1], of either kind of views."""
    return views.to(dtype) / 255 if views.dtype == torch.uint8 else views.to(dtype)
