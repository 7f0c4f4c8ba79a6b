"""What the agent sees of an observation."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor

from crpt.encoder import Encoder


class FeatureExtractor:
    """h, or sqrt(D) z (a component has mean square 1), of a frozen encoder.

    uint8 [B, C, H, W] -> float32 [B, F]. Works on a copy: the caller's encoder stays as it is.
    """

    def __init__(self, encoder: Encoder, features: Literal["h", "z"], device: torch.device) -> None:
        own = copy.deepcopy(encoder).freeze()
        self.encoder = own.to(device, memory_format=torch.channels_last)
        self.features = features
        self.frame_stack = encoder.config.in_channels // 3
        self.device = device
        self.dim: int = encoder.feature_dim if features == "h" else encoder.config.projection_dim

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        obs = obs.to(self.device)
        if self.features == "h":
            return self.encoder(obs)
        return math.sqrt(self.dim) * self.encoder.embed(obs)

    @torch.no_grad()
    def embedding(self, features: Tensor) -> Tensor:
        """z, of unit length, of features that this extractor made: [B, F] -> [B, D]."""
        if self.features == "h":
            return self.encoder.embed_features(features)
        return features / math.sqrt(self.dim)
