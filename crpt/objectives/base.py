"""What every pre-training objective is: an encoder, a loss of two views, and a few hooks."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from crpt.byte_encoder import project_bytes
from crpt.config import PretrainConfig
from crpt.distributed import ALONE, Team
from crpt.encoder import Encoder, orthogonal_init
from crpt.objectives.team_norm import TeamBatchNorm1d


@dataclass(frozen=True)
class Losses:
    """One update's loss and what the measures need of it; all but `total` without a gradient."""

    total: Tensor
    """What is minimised, a scalar."""
    parts: Mapping[str, Tensor]
    """The scalars that it is made of, by the names they have in the log."""
    distance: Tensor
    """From the trivial solution that each objective names, in its own unit: at 0 the loss is no
    better than there, and the encoder has learned next to nothing."""
    z: Tensor
    """Embeddings of the batch, [B, D], of unit length."""
    scores: Tensor | None = field(default=None)
    """Their similarities to the prototypes, [B, M], of an objective that has some."""
    codes: Tensor | None = field(default=None)
    """Their balanced assignments to the prototypes, [B, M]."""
    rows: Tensor | None = field(default=None)
    """In mixed batches, [B, 2]: what each row adds to the mean that `Objective.row_loss` names, and
    what it would add in the trivial solution."""
    by_domain: Tensor | None = field(default=None)
    """Of `rows`, the means of each domain's, [domains, 2]: filled in by the trainer."""

    def of_rows(self, change: Callable[[Tensor], Tensor]) -> Losses:
        """With another z, scores and codes, as `change` makes them of these."""
        return replace(
            self,
            z=change(self.z),
            scores=None if self.scores is None else change(self.scores),
            codes=None if self.codes is None else change(self.codes),
        )


class Objective(nn.Module, ABC):
    """forward(obs, next_obs) -> Losses, for views that are float [B, K*C, H, W] in [0, 1]; or uint8
    where `bytes_are_faster`.

    An update is: before_update(), forward, backward, optimiser, after_update().
    """

    row_loss: ClassVar[str]
    """The part of the loss that is a mean over the batch's rows, and is compared with that of the
    trivial solution. It has weight 1 in the total."""
    has_prototypes: ClassVar[bool] = False
    """Whether there are `prototypes`: then they travel with the encoder, where an intrinsic reward
    looks for them, and how far they are spread is logged and judged."""
    prototypes: Tensor
    """Parameter or buffer, [M, D], M as `PretrainConfig.prototypes` says."""

    def __init__(self, encoder: Encoder, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        self.mixed = config.batches == "mixed"
        self.online = encoder
        self.team = ALONE

    @abstractmethod
    def forward(self, obs: Tensor, next_obs: Tensor) -> Losses: ...

    def join(self, team: Team) -> None:
        """From now on every batch is spread over the processes of a team, in equal parts; what is
        computed over a batch is computed over all of them."""
        self.team = team
        if team.group is None:
            return
        for encoder in self.modules():
            if isinstance(encoder, Encoder) and isinstance(encoder.norm, nn.BatchNorm1d):
                encoder.norm = TeamBatchNorm1d(encoder.norm, team.group)

    def before_update(self) -> None:
        """What the parameters are held to, before every update."""

    def after_update(self) -> None:
        """What follows the parameters, after every update."""

    def export(self) -> Encoder:
        """A copy of the trained encoder, with the prototypes attached, if there are some."""
        encoder = copy.deepcopy(self.online)
        if self.has_prototypes:
            encoder.attach_prototypes(self.prototypes)
        return encoder

    def distance(self, loss: Tensor, trivial: Tensor) -> Tensor:
        """`Losses.distance`, of the mean of some rows' losses and that of their trivial ones."""
        return trivial - loss

    def project(self, encoder: Encoder, pixels: Tensor) -> Tensor:
        """norm(g(f(pixels))), [B, D] in float32; bf16 reaches no further than the projector."""
        if pixels.dtype == torch.uint8:
            return project_bytes(encoder, pixels)
        low = self.config.precision == "bf16"
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=low):
            return encoder.project(encoder.features(pixels))


class TargetObjective(Objective):
    """An objective whose next view goes through a moving average of the encoder."""

    def __init__(self, encoder: Encoder, config: PretrainConfig) -> None:
        super().__init__(encoder, config)
        self.predictor = nn.Sequential(
            nn.Linear(config.projection_dim, config.predictor_hidden),
            nn.ReLU(),
            nn.Linear(config.predictor_hidden, config.projection_dim),
        ).apply(orthogonal_init)
        self.target = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def after_update(self) -> None:
        """target <- (1 - rate) target + rate online."""
        target: list[Tensor] = list(self.target.parameters())
        online: list[Tensor] = list(self.online.parameters())
        torch._foreach_lerp_(target, online, self.config.target_rate)
