"""Fine-tuning: SAC on the frozen encoder's features (`python -m crpt.finetune`)."""

from __future__ import annotations

import torch
from tqdm import tqdm

from crpt.agents.policy import mean_action, trained_policy
from crpt.config import FinetuneConfig
from crpt.encoder import Encoder
from crpt.evaluate import Policy
from crpt.finetune.finetuner import STAGE, Finetuner, MakeEnv
from crpt.interrupt import Interrupted, StopRequest
from crpt.run_directory import RunDirectory

__all__ = ["STAGE", "finetune"]


def finetune(
    config: FinetuneConfig,
    encoder: Encoder,
    run: RunDirectory,
    make_env: MakeEnv,
    *,
    seed: int,
    device: str = "cpu",
    progress: bool = True,
) -> Policy:
    """Train for `config.agent_steps` on one task, from the last checkpoint on; returns the
    mean-action policy.

    Raises Interrupted on Ctrl-C, after a checkpoint of the last whole episode's end.
    Raises FloatingPointError for losses or weights that are not finite and CheckpointError for a
    checkpoint without its replay; what was saved is kept.
    """
    saved = run.load_checkpoint(STAGE)
    if saved is not None and saved["counters"]["agent_steps"] >= config.agent_steps:
        env = make_env()
        try:
            return trained_policy(config, encoder, env, saved, device=device)
        finally:
            env.close()
    finetuner = Finetuner(
        config, encoder, run, make_env, seed=seed, device=torch.device(device), saved=saved
    )
    try:
        _train(finetuner, progress)
    finally:
        finetuner.close()
    return mean_action(finetuner.agent.actor, finetuner.extractor)


def _train(finetuner: Finetuner, progress: bool) -> None:
    config, run, counters = finetuner.config, finetuner.run, finetuner.counters
    saved_at = counters.agent_steps
    run.rewind_logs(STAGE, saved_at)
    bar = tqdm(
        total=config.agent_steps,
        initial=saved_at,
        desc="finetune",
        unit="step",
        disable=not progress,
    )
    with StopRequest() as stop, bar:

        def check_stop() -> None:
            nonlocal saved_at
            if stop.requested:
                if counters.agent_steps > saved_at:
                    saved_at = finetuner.save_remembered() or saved_at
                raise Interrupted(
                    f"finetune stopped at agent step {counters.agent_steps} of "
                    f"{config.agent_steps}; it goes on from step {saved_at}"
                )

        while counters.agent_steps < config.agent_steps:
            episode_return = finetuner.run_episode(bar.update, check_stop)
            if episode_return is not None:
                bar.set_postfix({"return": f"{episode_return:.1f}"})
                run.log(STAGE, counters.agent_steps, train_return=round(episode_return, 3))
            if finetuner.checkpoint_is_due(saved_at) or stop.requested:
                finetuner.save()
                saved_at = counters.agent_steps
            finetuner.remember()
            check_stop()
    check_stop()  # also for a request while the bar was closed: `train` should not go on
