"""What a run is asked to do: the stages' fields, and the presets. Nothing changes a config after it
was built."""

from crpt.config.presets import PRESETS, Preset
from crpt.config.stages import (
    GROWS,
    RESUMABLE,
    CollectConfig,
    EncoderStages,
    EvaluateConfig,
    FinetuneConfig,
    Objective,
    PretrainConfig,
    ProbeConfig,
    Stages,
)

__all__ = [
    "GROWS",
    "PRESETS",
    "RESUMABLE",
    "CollectConfig",
    "EncoderStages",
    "EvaluateConfig",
    "FinetuneConfig",
    "Objective",
    "Preset",
    "PretrainConfig",
    "ProbeConfig",
    "Stages",
]
