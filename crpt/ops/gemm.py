"""The matrix product inside the operators: torch's, in the dtype of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, also where autocast would have lowered the precision."""
    device = a.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return torch.matmul(a, b)
    return torch.matmul(a, b)
