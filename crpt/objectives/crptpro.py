"""The objective of CRPTpro: compare views through prototypes, and push the prototypes apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crpt.ops
from crpt.config import PretrainConfig
from crpt.encoder import Encoder
from crpt.objectives.base import Losses, TargetObjective


class CRPTPro(TargetObjective):
    """L = L_comp + w L_intr (arXiv 2302.05614, section III).

    s = normalise(predictor(g(f(obs)))),  t = normalise(g'(f'(next_obs)))
    codes  = sinkhorn(t C^T / T)                                   (no gradient)
    L_comp = -mean_b sum_m codes_bm log softmax_m(s C^T / T)
    L_intr = 1/M^2 sum_{i != j} s_ij / (sg(s_ij) + offset),  s_ij = sg(c_i) . c_j

    Trivial solution: uniform codes, whose L_comp is log M. With intrinsic: knn, L_intr is that of
    `ablated_intrinsic_loss`; with none there is none, and L is the representation loss of Proto-RL
    (Yarats et al., arXiv 2102.11271).
    """

    row_loss = "comparison_loss"
    has_prototypes = True

    def __init__(self, encoder: Encoder, config: PretrainConfig) -> None:
        super().__init__(encoder, config)
        self.prototypes = nn.Parameter(
            nn.init.orthogonal_(torch.empty(config.prototypes, config.projection_dim))
        )

    @torch.no_grad()
    def before_update(self) -> None:
        """Rows of C to unit length."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=-1))

    def forward(self, obs: Tensor, next_obs: Tensor) -> Losses:
        c = self.config
        with torch.no_grad():
            t = F.normalize(self.project(self.target, next_obs), dim=-1)  # [B, D]
            scores = crpt.ops.prototype_similarity(t, self.prototypes)  # [B, M]
            codes = crpt.ops.sinkhorn(
                scores, c.temperature, c.sinkhorn_iterations, group=self.team.group
            )
        online = self.predictor(self.project(self.online, obs))  # [B, D], s before normalising
        dot = c.intrinsic == "dot"
        # Of the rows of C, which have unit length, it takes the gradient of the plain s C^T.
        total, comparison, intrinsic = crpt.ops.prototype_objective(
            online, self.prototypes, codes, c.temperature,
            c.intrinsic_weight if dot else 0.0, c.intrinsic_offset,
        )  # fmt: skip
        if not dot:
            intrinsic = self.ablated_intrinsic_loss()
            total = total + c.intrinsic_weight * intrinsic
        return Losses(
            total=total,
            parts={"comparison_loss": comparison.detach(), "intrinsic_loss": intrinsic.detach()},
            distance=math.log(c.prototypes) - comparison.detach(),
            z=t,
            scores=scores,
            codes=codes,
            rows=self._rows(online.detach(), codes) if self.mixed else None,
        )

    @torch.no_grad()
    def _rows(self, online: Tensor, codes: Tensor) -> Tensor:
        """L_comp of each row, which the operator does not tell, and log M: [B, 2]."""
        c = self.config
        scores = crpt.ops.prototype_similarity(online, self.prototypes)  # [B, M]
        loss = -(codes * (scores / c.temperature).log_softmax(dim=-1)).sum(dim=-1)
        return torch.stack([loss, torch.full_like(loss, math.log(c.prototypes))], dim=1)

    def ablated_intrinsic_loss(self) -> Tensor:
        """What stands in the place of L_intr: 0 with none, and with knn

            L_knn = 1/M sum_i s_i(3),  s_ij = sg(c_i) . c_j

        s_i(3) is the third largest of s_i1, ..., s_iM. The largest is s_ii = 1, so it is how near
        the second nearest of the other prototypes lies.

        Source: CRPTpro's published code, forward_knn with topk 3 (github.com/liuxin0824/CRPTpro,
        proto.py).
        """
        if self.config.intrinsic == "knn":
            similarity = self.prototypes.detach() @ self.prototypes.T  # [M, M]
            return similarity.topk(3, dim=-1).values[:, 2].mean()
        return self.prototypes.new_zeros(())
