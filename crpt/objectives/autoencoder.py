"""Reconstruction: the pixels, from the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crpt.byte_encoder import pixels_of
from crpt.config import PretrainConfig
from crpt.encoder import Encoder, EncoderConfig, orthogonal_init
from crpt.objectives.base import Losses, Objective


class Autoencoder(Objective):
    """L = mean over samples and pixels of (decoder(z) - obs)^2,  z = normalise(norm(g(f(obs)))).

    The decoder mirrors f: Linear D -> 39,200, then transposed convolutions 3x3. Trivial solution:
    the mean image of the batch, whose loss is the variance of its pixels; the distance from it is
    the share of that variance which is explained.

    Source: Yarats et al., SAC+AE (arXiv 1910.01741), section 4.2, with z of unit length instead of
    a penalty on it. Of each transition the first observation is used.
    """

    row_loss = "reconstruction_loss"

    def __init__(self, encoder: Encoder, config: PretrainConfig) -> None:
        super().__init__(encoder, config)
        self.decoder = Decoder(encoder.config)

    def forward(self, obs: Tensor, next_obs: Tensor) -> Losses:
        z = F.normalize(self.project(self.online, obs), dim=-1)  # [B, D]
        pixels = pixels_of(obs, z.dtype)
        decoded = self.decoder(z)
        loss = F.mse_loss(decoded, pixels)
        reconstruction = loss.detach()
        mean = self.team.mean(pixels.mean(dim=0))
        trivial = self.team.mean((pixels - mean).square().mean())
        rows = None
        if self.mixed:
            missed = (decoded.detach() - pixels, pixels - mean)
            rows = torch.stack([x.square().flatten(1).mean(dim=1) for x in missed], dim=1)
        return Losses(
            total=loss,
            parts={"reconstruction_loss": reconstruction},
            distance=self.distance(reconstruction, trivial),
            z=z.detach(),
            rows=rows,
        )

    def distance(self, loss: Tensor, trivial: Tensor) -> Tensor:
        """The share of the variance that is explained."""
        return 1 - loss / trivial.clamp_min(1e-12)


class Decoder(nn.Module):
    """z, [B, D] -> pixels, [B, K*C, S, S]: the layers of `EncoderConfig` in reverse."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        sizes = [config.image_size]
        for stride in config.strides:
            sizes.append((sizes[-1] - 3) // stride + 1)
        self.unflattened = (config.channels, sizes[-1], sizes[-1])
        self.linear = nn.Linear(config.projection_dim, config.channels * sizes[-1] ** 2)
        layers: list[nn.Module] = []
        for i in reversed(range(len(config.strides))):
            stride = config.strides[i]
            # What the strided convolution left over at the border.
            rest = sizes[i] - ((sizes[i + 1] - 1) * stride + 3)
            out = config.channels if i > 0 else config.in_channels
            layers += [
                nn.ReLU(),
                nn.ConvTranspose2d(config.channels, out, 3, stride, output_padding=rest),
            ]
        self.deconvolutions = nn.Sequential(*layers)
        self.apply(orthogonal_init)

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.deconvolutions(self.linear(z).unflatten(1, self.unflattened))
        return pixels
