"""Pre-training as it is written without this package: numpy, eager PyTorch and torch.optim."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from crpt.config import PretrainConfig
from crpt.ops import reference


class UsualReplay:
    """The two stacks of every transition, each frame in as many of them as it is seen in."""

    def __init__(self, obs: NDArray[np.uint8], next_obs: NDArray[np.uint8]) -> None:
        self.obs = obs  # [T, K*C, H, W]
        self.next_obs = next_obs

    def __len__(self) -> int:
        return len(self.obs)

    def sample(self, batch_size: int, pad: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        chosen = rng.integers(len(self), size=batch_size)
        shifts = rng.integers(0, 2 * pad + 1, size=(2, batch_size, 2))
        return self.views(chosen, shifts, pad)

    def views(
        self, chosen: NDArray[np.int64], shifts: NDArray[np.int64], pad: int
    ) -> tuple[Tensor, Tensor]:
        """obs and next_obs, [B, K*C, H, W] in [0, 1]; shifts [2, B, 2] count from -pad."""
        return (
            shifted(as_floats(self.obs[chosen]), shifts[0], pad),
            shifted(as_floats(self.next_obs[chosen]), shifts[1], pad),
        )


def as_floats(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def shifted(images: Tensor, shifts: NDArray[np.int64], pad: int) -> Tensor:
    """Replicate-pad, then crop every sample at its own corner."""
    if pad == 0:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (pad,) * 4, mode="replicate")
    crops = [
        padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(shifts.tolist())
    ]
    return torch.stack(crops)


class UsualModel(nn.Module):
    """Encoder, projector, predictor and prototypes, and the target's copies of the first two."""

    def __init__(self, in_channels: int, image_size: int, config: PretrainConfig) -> None:
        super().__init__()
        c, size = config, image_size
        for stride in (2, 1, 1, 1):
            size = (size - 3) // stride + 1
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, stride=2), nn.ReLU(),
            nn.Conv2d(32, 32, 3), nn.ReLU(),
            nn.Conv2d(32, 32, 3), nn.ReLU(),
            nn.Conv2d(32, 32, 3), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        standardised = c.embedding_norm == "batch"
        projector: list[nn.Module] = [
            nn.Linear(32 * size * size, c.projection_dim, bias=not standardised)
        ]
        if standardised:
            projector.append(nn.BatchNorm1d(c.projection_dim, affine=False))
        self.projector = nn.Sequential(*projector)
        self.predictor = nn.Sequential(
            nn.Linear(c.projection_dim, c.predictor_hidden), nn.ReLU(),
            nn.Linear(c.predictor_hidden, c.projection_dim),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(c.prototypes, c.projection_dim))
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)


class UsualTrainer:
    """CRPTPro's update; the losses are those of `crpt.objectives.crptpro`."""

    def __init__(self, model: UsualModel, config: PretrainConfig) -> None:
        self.model = model
        self.config = config
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=config.learning_rate)

    def losses(self, obs: Tensor, next_obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, c = self.model, self.config
        with torch.no_grad():
            m.prototypes.copy_(F.normalize(m.prototypes, dim=-1))
            t = F.normalize(m.target_projector(m.target_encoder(next_obs)), dim=-1)
            codes = reference.sinkhorn(t @ m.prototypes.T, c.temperature, c.sinkhorn_iterations)
        s = F.normalize(m.predictor(m.projector(m.encoder(obs))), dim=-1)
        comparison = reference.prototype_loss(s @ m.prototypes.T, codes, c.temperature)
        intrinsic = reference.intrinsic_loss(m.prototypes, c.intrinsic_offset)
        return comparison + c.intrinsic_weight * intrinsic, comparison, intrinsic

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()

    @torch.no_grad()
    def finish(self) -> None:
        """The optimiser's step, and the target's."""
        self.optimizer.step()
        m, rate = self.model, self.config.target_rate
        for target, online in (
            (m.target_encoder, m.encoder),
            (m.target_projector, m.projector),
        ):
            for p, q in zip(target.parameters(), online.parameters(), strict=True):
                p.mul_(1 - rate).add_(rate * q)
