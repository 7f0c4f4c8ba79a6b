"""The README.md of an exported encoder, in the form that model hubs show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crpt.encoder import Encoder
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
    frames = config.in_channels // 3
    trained_on = {
        "objective": told.get("objective"),
        "domains": ", ".join(told["domains"]) if told.get("domains") else None,
        "weights": _by_name(told.get("weights")),
        "updates": told.get("updates"),
        "batch size": told.get("batch_size"),
        "seed": told.get("seed"),
        "transitions per domain": told.get("transitions"),
        "action repeat": told.get("action_repeat"),
        "rendering": told.get("render"),
    }
    rows = "\n".join(
        f"| {name} | {value} |" for name, value in trained_on.items() if value is not None
    )
    parts = [
        "---\nlibrary_name: crpt\ntags: [reinforcement-learning, visual-rl, dm_control]\n---",
        "# Visual encoder for control, pre-trained on reward-free random play",
        f"Observations are {frames} stacked RGB frames of {config.image_size}x{config.image_size}, "
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


def _by_name(weights: dict[str, int] | None) -> str | None:
    return ", ".join(f"{name} {w}" for name, w in weights.items()) if weights else None
