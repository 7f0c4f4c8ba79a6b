"""All stages in one command: `python -m crpt.train`."""

from __future__ import annotations

from crpt.config import Stages
from crpt.stages import (
    Context,
    collect_stage,
    evaluate_stage,
    finetune_stage,
    pretrain_stage,
    probe_stage,
    require_known_names,
)
from crpt.summary import render, summarise


def train(context: Context, stages: Stages) -> str:
    """Collect, pre-train, probe, fine-tune, evaluate; the summary as text, also in
    `summary.json`."""
    require_known_names(
        context, *stages.collect.domains, *stages.probe.unseen, stages.finetune.task
    )
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
    collect_stage(context, stages.collect)
    pretrain_stage(context, stages.pretrain)
    probe_stage(context, stages.probe)
    finetune_stage(context, stages.finetune)
    evaluate_stage(context, stages.evaluate, stages.finetune)
    summary = summarise(context.run)
    context.run.write_json("summary.json", summary)
    return render(summary)


if __name__ == "__main__":
    from crpt.commands import run

    run("train")
