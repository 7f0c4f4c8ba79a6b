"""The objective of CRPTpro: compare views through prototypes, and push the prototypes apart."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crpt.ops
from crpt.config import PretrainConfig
from crpt.encoder import Encoder, orthogonal_init


@dataclass(frozen=True)
class Losses:
    """One update's losses (scalars) and what the measures need of it."""

    total: Tensor
    comparison: Tensor
    intrinsic: Tensor
    codes: Tensor  # [B, M]
    target: Tensor  # [B, D], unit length


class CRPTPro(nn.Module):
    """L = L_comp + w L_intr (arXiv 2302.05614, section III).

    s = normalise(predictor(g(f(obs)))),  t = normalise(g'(f'(next_obs)))
    codes  = sinkhorn(t C^T / T)                                   (no gradient)
    L_comp = -mean_b sum_m codes_bm log softmax_m(s C^T / T)
    L_intr = 1/M^2 sum_{i != j} s_ij / (sg(s_ij) + offset),  s_ij = sg(c_i) . c_j
    """

    def __init__(self, encoder: Encoder, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.online = encoder
        self.predictor = nn.Sequential(
            nn.Linear(config.projection_dim, config.predictor_hidden),
            nn.ReLU(),
            nn.Linear(config.predictor_hidden, config.projection_dim),
        ).apply(orthogonal_init)
        self.prototypes = nn.Parameter(
            nn.init.orthogonal_(torch.empty(config.prototypes, config.projection_dim))
        )
        self.target = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def project_prototypes(self) -> None:
        """Rows of C to unit length; before each update."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=-1))

    def forward(self, obs: Tensor, next_obs: Tensor) -> Losses:
        """obs, next_obs: float [B, 3K, H, W] in [0, 1], shifted."""
        c = self.config
        with torch.no_grad():
            t = F.normalize(self._project(self.target, next_obs), dim=-1)  # [B, D]
            scores = crpt.ops.prototype_similarity(t, self.prototypes)  # [B, M]
            codes = crpt.ops.sinkhorn(scores, c.temperature, c.sinkhorn_iterations)
        online = self.predictor(self._project(self.online, obs))  # [B, D], s before normalising
        dot = c.intrinsic == "dot"
        # Of the rows of C, which have unit length, it takes the gradient of the plain s C^T.
        total, comparison, intrinsic = crpt.ops.prototype_objective(
            online, self.prototypes, codes, c.temperature,
            c.intrinsic_weight if dot else 0.0, c.intrinsic_offset,
        )  # fmt: skip
        if not dot:
            intrinsic = self.ablated_intrinsic_loss()
            total = total + c.intrinsic_weight * intrinsic
        return Losses(total, comparison, intrinsic, codes, t)

    def _project(self, encoder: Encoder, pixels: Tensor) -> Tensor:
        """norm(g(f(pixels))), [B, D] in float32; bf16 reaches no further than the projector."""
        low = self.config.precision == "bf16"
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=low):
            return encoder.project(encoder.features(pixels))

    def ablated_intrinsic_loss(self) -> Tensor:
        """What stands in the place of L_intr."""
        if self.config.intrinsic == "knn":
            similarity = self.prototypes.detach() @ self.prototypes.T  # [M, M]
            return similarity.topk(3, dim=-1).values[:, 2].mean()
        return self.prototypes.new_zeros(())

    def export(self) -> Encoder:
        """A copy of the online encoder, with the prototypes attached."""
        encoder = copy.deepcopy(self.online)
        encoder.attach_prototypes(self.prototypes)
        return encoder

    @torch.no_grad()
    def update_target(self) -> None:
        """target <- (1 - rate) target + rate online."""
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.lerp_(online, self.config.target_rate)
