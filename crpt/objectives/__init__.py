"""Pre-training objectives, one room each. A new one is a file here, a line in OBJECTIVES and its
name in `crpt.config.stages.Objective`: mypy knows the names of a Literal only where they are
written out, and the config is below the objectives and cannot ask them."""

from __future__ import annotations

from crpt.config import PretrainConfig
from crpt.encoder import Encoder
from crpt.objectives.atc import ATC
from crpt.objectives.autoencoder import Autoencoder
from crpt.objectives.base import Losses, Objective
from crpt.objectives.byol import BYOL
from crpt.objectives.crptpro import CRPTPro

__all__ = ["OBJECTIVES", "Losses", "Objective", "build"]

OBJECTIVES: dict[str, type[Objective]] = {
    "crptpro": CRPTPro,
    "atc": ATC,
    "byol": BYOL,
    "autoencoder": Autoencoder,
}


def build(encoder: Encoder, config: PretrainConfig) -> Objective:
    """The objective that the config names, around an encoder."""
    return OBJECTIVES[config.objective](encoder, config)
