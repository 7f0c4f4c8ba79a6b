"""The README.md of an exported encoder, in the form that model hubs show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crpt.encoder import Encoder
from crpt.envs.gymnasium_env import is_gymnasium_id
from crpt.files import replace_file
from crpt.summary import probe_text

CARD_FILE = "README.md"


def write_card(encoder: Encoder, directory: Path, probes: dict[str, Any] | None = None) -> None:
    """Say what the encoder is, what it was trained on and how it is used; with the content of
    probe.json, also what it knows."""
    text = card(encoder, probes)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / CARD_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def card(encoder: Encoder, probes: dict[str, Any] | None = None) -> str:
    config, told = encoder.config, encoder.metadata
    trained_on = {
        "objective": told.get("objective"),
        "domains": ", ".join(told["domains"]) if told.get("domains") else None,
        "weights": _by_name(told.get("weights")),
        "updates": told.get("updates"),
        "batch size": told.get("batch_size"),
        "learning rate": told.get("learning_rate"),
        "schedule of the learning rate": told.get("schedule"),
        "intrinsic loss": told.get("intrinsic"),
        "intrinsic weight": told.get("intrinsic_weight"),
        "precision": told.get("precision"),
        "seed": told.get("seed"),
        "seeds of the random play": _seeds(told.get("dataset_seeds") or []),
        "transitions per domain": _transitions(told.get("transitions")),
        "action repeat": told.get("action_repeat"),
        "rendering": told.get("render"),
        "versions": _versions(told.get("versions") or {}),
    }
    rows = "\n".join(
        f"| {name} | {value} |" for name, value in trained_on.items() if value is not None
    )
    parts = [
        f"---\nlibrary_name: crpt\ntags: [{', '.join(_tags(told.get('domains') or []))}]\n---",
        "# Visual encoder for control, pre-trained on reward-free random play",
        f"Observations are {_frames(encoder)} of {config.image_size}x{config.image_size}, "
        f"uint8 [..., {config.in_channels}, {config.image_size}, {config.image_size}], oldest "
        f"first. h = f(obs) has {encoder.feature_dim:,} dimensions, the embedding z = "
        f"normalise(norm(g(h))) has {config.projection_dim}; {config.prototypes} prototypes travel "
        "with it.",
        "```python\nimport crpt\n\n"
        'encoder = crpt.Encoder.from_pretrained("path/to/this/directory")  # frozen\n'
        "h, z = encoder(obs), encoder.embed(obs)\n```",
        f"## Training\n\n| | |\n|---|---|\n{rows}" if rows else "",
        f"## What it knows\n\n```\n{probe_text(probes)}\n```" if probes else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tags(domains: list[str]) -> list[str]:
    """Names that are no ids of Gymnasium's are of dm_control."""
    own = [] if all(map(is_gymnasium_id, domains)) else ["dm_control"]
    return ["reinforcement-learning", "visual-rl", *own]


def _frames(encoder: Encoder) -> str:
    channels = encoder.frame_channels
    if channels == 3:
        return f"{encoder.frame_stack} stacked RGB frames"
    return f"{encoder.frame_stack} stacked frames (channels of each: {channels})"


def _transitions(held: dict[str, int] | int | None) -> str | int | None:
    """Of each domain, where they differ; a number in encoders of before, for all."""
    if not isinstance(held, dict):
        return held
    if len(set(held.values())) == 1:
        return next(iter(held.values()))
    return ", ".join(f"{domain} {n}" for domain, n in held.items())


def _seeds(seeds: list[int | None]) -> str | None:
    """Of several datasets in their order; nothing where none is known."""
    if all(seed is None for seed in seeds):
        return None
    return ", ".join("unknown" if seed is None else str(seed) for seed in seeds)


def _versions(versions: dict[str, str]) -> str | None:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or None


def _by_name(weights: dict[str, int] | None) -> str | None:
    return ", ".join(f"{name} {w}" for name, w in weights.items()) if weights else None
