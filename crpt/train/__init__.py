"""All stages in one command: `python -m crpt.train`."""

from __future__ import annotations

from crpt.config import Stages
from crpt.encoder import EncoderConfig, feature_map_size
from crpt.objectives import OBJECTIVES
from crpt.pretrain.inputs import largest_batch
from crpt.stages import (
    Context,
    collect_stage,
    evaluate_stage,
    finetune_stage,
    pretrain_stage,
    probe_stage,
    require_known_names,
    warn_of_another_action_repeat,
)
from crpt.summary import render, summarise


def train(context: Context, stages: Stages) -> str:
    """Collect, pre-train, probe, fine-tune, evaluate; the summary as text, also in
    `summary.json`."""
    require_known_names(
        context, *stages.collect.domains, *stages.probe.unseen, stages.finetune.task
    )
    _require_that_stages_fit(stages)
    context.run.check(
        {
            "seed": context.seed,
            "collect": stages.collect,
            "pretrain": stages.pretrain,
            "probe": stages.probe,
            "finetune": stages.finetune,
            "evaluate": stages.evaluate,
        }
    )
    warn_of_another_action_repeat(stages.finetune, stages.collect.action_repeat)
    collect_stage(context, stages.collect)
    pretrain_stage(context, stages.pretrain)
    probe_stage(context, stages.probe)
    finetune_stage(context, stages.finetune)
    evaluate_stage(context, stages.evaluate, stages.finetune)
    summary = summarise(context.run)
    context.run.write_json("summary.json", summary)
    return render(summary)


def _require_that_stages_fit(stages: Stages) -> None:
    """What a later stage would refuse is told before hours are spent on the stages ahead of it."""
    played, pretrain, finetune = stages.collect.domains, stages.pretrain, stages.finetune
    unknown = [name for name in pretrain.domains if name not in played]
    if unknown:
        raise ValueError(
            f"pretrain.domains should be some of those collected, {', '.join(played)}, got "
            f"{', '.join(unknown)}"
        )
    feature_map_size(EncoderConfig(image_size=stages.collect.image_size))
    trained_on = pretrain.domains or played
    most = largest_batch(pretrain, dict.fromkeys(trained_on, stages.collect.transitions))
    if pretrain.batch_size > most:
        raise ValueError(
            f"pretrain.batch_size should be at most {most}, as many as there are transitions for "
            f"with collect.transitions {stages.collect.transitions}, got {pretrain.batch_size}"
        )
    if finetune.embedding_statistics == "task" and pretrain.embedding_norm == "none":
        raise ValueError(
            "finetune.embedding_statistics should be pretraining with pretrain.embedding_norm "
            "none, got task"
        )
    if finetune.intrinsic_reward > 0 and not OBJECTIVES[pretrain.objective].has_prototypes:
        raise ValueError(
            f"finetune.intrinsic_reward should be 0 with pretrain.objective {pretrain.objective}, "
            f"which has no prototypes, got {finetune.intrinsic_reward:g}"
        )
