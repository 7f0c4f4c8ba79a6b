"""Figures, drawn with matplotlib (`pip install crpt[report]`)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_POINTS = 1_000  # of each domain; more only hide each other


def available(path: Path) -> bool:
    """Whether a figure can be drawn; says how if not."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    _log.warning('%s is not drawn, for want of matplotlib: pip install "crpt[report]"', path)
    return False


def domain_map(z: Mapping[str, Tensor], prototypes: Tensor, path: Path) -> None:
    """Embeddings of every domain, [N, D] each, and prototypes, [M, D], in the plane of the two
    directions in which the embeddings vary most (all domains weighing the same)."""
    from matplotlib.figure import Figure

    from crpt.files import replace_file

    shown = {name: x[:: -(-len(x) // _POINTS)] for name, x in z.items()}
    centre = torch.stack([x.double().mean(dim=0) for x in z.values()]).mean(dim=0)
    balanced = torch.cat([(x.double() - centre) / len(x) ** 0.5 for x in z.values()])
    plane = torch.linalg.svd(balanced, full_matrices=False).Vh[:2].T  # [D, 2]

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for name, x in shown.items():
        at = (x.double() - centre) @ plane
        axes.scatter(at[:, 0], at[:, 1], s=4, alpha=0.5, linewidths=0, label=name)
    if len(prototypes):
        at = (prototypes.double() - centre) @ plane
        axes.scatter(at[:, 0], at[:, 1], s=14, c="black", marker="x", linewidths=0.7,
                     label="prototypes")  # fmt: skip
    axes.set_xlabel("first principal component of z")
    axes.set_ylabel("second")
    axes.legend(markerscale=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda draft: figure.savefig(draft, dpi=150, format="png"))
