"""What a study has found: a table in Markdown, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crpt.files import replace_file

Rows = Sequence[dict[str, Any]]

# Heading, key of the figures, format.
COLUMNS = (
    ("R2 of z, seen", "z_seen", "{:.3f}"),
    ("gain", "z_seen_gain", "{:+.3f}"),
    ("R2 of z, unseen", "z_unseen", "{:.3f}"),
    ("gain", "z_unseen_gain", "{:+.3f}"),
    ("R2 of h, seen", "h_seen", "{:.3f}"),
    ("unseen", "h_unseen", "{:.3f}"),
    ("rank of z", "effective_rank", "{:.0f}"),
    ("distance", "distance_from_trivial", "{:.2f}"),
    ("prototypes in use", "prototypes_in_use", "{:.0f}"),
    ("their mean cosine", "prototype_similarity_mean", "{:.3f}"),
    ("largest", "prototype_similarity_max", "{:.2f}"),
)


def by_variant(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["variant"], []).append(row)
    return grouped


def table(rows: Rows) -> str:
    """Means over seeds, with the deviation of the seeds where there are several."""
    grouped = by_variant(rows)
    domains = list(dict.fromkeys(name for row in rows for name in row["z_domains"]))
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    heads = ["variant", *(head for head, _, _ in columns), *domains]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for name, seeds in grouped.items():
        cells = [name]
        cells += [_cell([row.get(key) for row in seeds], form) for _, key, form in columns]
        cells += [_cell([row["z_domains"].get(d) for row in seeds], "{:.3f}") for d in domains]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = form.format(float(np.mean(known)))
    if len(known) == 1:
        return mean
    return f"{mean} ± {form.replace('+', '').format(float(np.std(known)))}"


def draw(rows: Rows, axis: str | None, path: Path) -> None:
    """Probes and coverage over the axis, or a bar of each variant's gains."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    if axis is None:
        figure.set_size_inches(8, 1 + 0.3 * len(by_variant(rows)))
        _bars(figure.subplots(), rows)
    else:
        figure.set_size_inches(10, 4)
        _curves(figure.subplots(1, 2), rows, axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda draft: figure.savefig(draft, dpi=130, format="png"))


def _bars(axes: Any, rows: Rows) -> None:
    grouped = by_variant(rows)
    at = np.arange(len(grouped))
    for offset, group in ((-0.2, "seen"), (0.2, "unseen")):
        key = f"z_{group}_gain"
        values = [[row[key] for row in seeds if key in row] for seeds in grouped.values()]
        mean = [np.mean(v) if v else np.nan for v in values]
        spread = [np.std(v) if v else np.nan for v in values]
        axes.barh(at + offset, mean, 0.4, xerr=spread, label=f"{group} domains")
    axes.set_yticks(at, grouped)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.7)
    axes.set_xlabel("gain of z's held-out probe R2 over init")
    axes.legend(frameon=False)


def _curves(both: Any, rows: Rows, axis: str) -> None:
    probes, coverage = both
    for key, label in (("z_seen", "seen domains"), ("z_unseen", "unseen domains")):
        _curve(probes, rows, key, label)
    probes.set_ylabel("held-out probe R2 of z")
    for key, label in (
        ("prototype_similarity_mean", "mean cosine of two prototypes"),
        ("prototype_similarity_max", "largest"),
    ):
        _curve(coverage, rows, key, label)
    coverage.set_ylabel("similarity of prototypes")
    largest = max(row["x"] for row in rows)
    positive = [row["x"] for row in rows if row["x"] > 0]
    for axes in both:
        if positive and largest > 10 * min(positive):
            axes.set_xscale("symlog", linthresh=min(positive))
        axes.set_xlabel(axis)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)


def _curve(axes: Any, rows: Rows, key: str, label: str) -> None:
    grouped = [[row for row in seeds if key in row] for seeds in by_variant(rows).values()]
    known = [seeds for seeds in grouped if seeds]
    if known:
        x = [seeds[0]["x"] for seeds in known]
        y = [[row[key] for row in seeds] for seeds in known]
        mean, spread = [np.mean(v) for v in y], [np.std(v) for v in y]
        axes.errorbar(x, mean, spread, marker="o", capsize=3, label=label)
