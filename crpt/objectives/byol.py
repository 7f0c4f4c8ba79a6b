"""Self-prediction: the embedding of the next frame, predicted from this one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crpt.objectives.base import Losses, TargetObjective


class BYOL(TargetObjective):
    """L = mean_b 2 - 2 <s_b, t_b>.

    s = normalise(predictor(g(f(obs)))),  t = normalise(g'(f'(next_obs))) without gradient, target
    by moving average. Trivial solution: equal embeddings of all frames, for which predicting the
    batch's mean direction is as good as anything: 2 - 2 |mean_b t_b|.

    Source: Grill et al. (arXiv 2006.07733), equation 2; one step ahead as in SPR, Schwarzer et al.
    (arXiv 2007.05929), equation 4 with K = 1. Without SPR's actions, which differ from domain to
    domain.
    """

    row_loss = "prediction_loss"

    def forward(self, obs: Tensor, next_obs: Tensor) -> Losses:
        with torch.no_grad():
            t = F.normalize(self.project(self.target, next_obs), dim=-1)  # [B, D]
        s = F.normalize(self.predictor(self.project(self.online, obs)), dim=-1)
        loss = 2 - 2 * (s * t).sum(-1).mean()
        prediction = loss.detach()
        mean = self.team.mean(t.mean(dim=0))
        trivial = 2 - 2 * mean.norm()
        rows = None
        if self.mixed:
            constant = F.normalize(mean, dim=0)
            rows = 2 - 2 * torch.stack([(s.detach() * t).sum(-1), t @ constant], dim=1)
        return Losses(
            total=loss,
            parts={"prediction_loss": prediction},
            distance=trivial - prediction,
            z=t,
            rows=rows,
        )
