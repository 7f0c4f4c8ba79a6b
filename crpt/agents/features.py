"""What the agent sees of an observation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from crpt.encoder import Encoder, on_device


class FeatureExtractor:
    """view(self(obs)): h, or sqrt(D) z (a component has mean square 1), of a frozen encoder.

    z = normalise((norm(g(h)) - shift) / deviation), with shift 0 and deviation 1 until
    `standardise_by` has estimated them anew. Works on a copy: the caller's encoder stays as it is.
    """

    def __init__(self, encoder: Encoder, features: Literal["h", "z"], device: torch.device) -> None:
        self.encoder = on_device(copy.deepcopy(encoder).freeze(), device)
        self.features = features
        self.frame_stack = encoder.frame_stack
        self.device = device
        self.dim: int = encoder.feature_dim if features == "h" else encoder.config.projection_dim
        self.shift = torch.zeros(encoder.config.projection_dim, device=device)
        self.deviation = torch.ones_like(self.shift)

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """h, or norm(g(h)), which no later estimate changes: uint8 [B, C, H, W] -> [B, F]."""
        h = self.encoder(obs.to(self.device))
        return h if self.features == "h" else self.encoder.project(h)

    def view(self, encoded: Tensor) -> Tensor:
        """What actor and critic see of it, [B, F] -> [B, F]."""
        if self.features == "h":
            return encoded
        return math.sqrt(self.dim) * self.embedding(encoded)

    @torch.no_grad()
    def embedding(self, encoded: Tensor) -> Tensor:
        """z, of unit length: [B, F] -> [B, D]."""
        return F.normalize((self._projected(encoded) - self.shift) / self.deviation, dim=-1)

    @torch.no_grad()
    def standardise_by(self, encoded: Iterable[Tensor]) -> None:
        """From now on z is standardised by the mean and deviation of these, several [B, F]."""
        projected = torch.cat([self._projected(part) for part in encoded])
        self.shift = projected.mean(dim=0)
        self.deviation = (projected.var(dim=0, correction=0) + 1e-5).sqrt()

    def state(self) -> dict[str, Tensor]:
        return {"shift": self.shift, "deviation": self.deviation}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.shift = state["shift"].to(self.device)
        self.deviation = state["deviation"].to(self.device)

    def _projected(self, encoded: Tensor) -> Tensor:
        return self.encoder.project(encoded) if self.features == "h" else encoded
