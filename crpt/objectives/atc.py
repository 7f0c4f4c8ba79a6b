"""Augmented temporal contrast: tell a frame's successor from those of the batch's other frames."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crpt.config import PretrainConfig
from crpt.encoder import Encoder
from crpt.objectives.base import Losses, TargetObjective


class ATC(TargetObjective):
    """L = -mean_b log softmax_j(p_b W c_j)_b  (InfoNCE over the batch).

    a = g(f(obs)),  p = a + predictor(a),  c = g'(f'(next_obs)) without gradient, W: [D, D] without
    bias, target by moving average. Trivial solution: log B, every successor equally likely.

    Source: Stooke et al., Decoupling Representation Learning from Reinforcement Learning
    (arXiv 2009.08319), section 3. There the successor is three steps ahead; here it is the next
    observation, as for the other objectives. Batches should hold one domain each: frames of another
    one are told apart by its looks.
    """

    row_loss = "contrastive_loss"

    def __init__(self, encoder: Encoder, config: PretrainConfig) -> None:
        super().__init__(encoder, config)
        self.contrast = nn.Parameter(torch.eye(config.projection_dim))

    def forward(self, obs: Tensor, next_obs: Tensor) -> Losses:
        with torch.no_grad():
            c = self.project(self.target, next_obs)  # [B, D]
            others = self.team.gather(c)  # [B of all processes, D]
        a = self.project(self.online, obs)
        p = a + self.predictor(a)
        logits = p @ self.contrast @ others.T  # [B, B of all processes]
        own = self.team.rank * len(c) + torch.arange(len(c), device=c.device)
        loss = F.cross_entropy(logits, own)
        contrastive = loss.detach()
        trivial = math.log(len(others))
        rows = None
        if self.mixed:
            each = F.cross_entropy(logits.detach(), own, reduction="none")
            rows = torch.stack([each, torch.full_like(each, trivial)], dim=1)
        return Losses(
            total=loss,
            parts={"contrastive_loss": contrastive},
            distance=trivial - contrastive,
            z=F.normalize(c, dim=-1),
            rows=rows,
        )
