"""What a run has shown, in one table a person reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from crpt.run_directory import RunDirectory


def summarise(run: RunDirectory) -> dict[str, Any]:
    """The figures of a finished run, from its files."""
    probes: dict[str, Any] | None = run.read_json("probe.json")
    return {
        "probe": probes,
        "mean_gain_seen": _mean_gain(probes, seen=True),
        "mean_gain_unseen": _mean_gain(probes, seen=False),
        "pretrain": _last_round(run.metrics("pretrain")),
        "evaluation": run.read_json("evaluation.json"),
    }


def _mean_gain(probes: dict[str, Any] | None, *, seen: bool) -> float | None:
    """Of z, whose R2 pre-training is judged by."""
    rows = probes["domains"] if probes else []
    gains = [row["gain"] for row in rows if row["seen"] == seen and row["features"] == "z"]
    return float(np.mean(gains)) if gains else None


def _last_round(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["step"] == lines[-1]["step"]]


def render(summary: dict[str, Any]) -> str:
    """The summary as text."""
    parts = []
    if summary["probe"]:
        parts.append(probe_text(summary["probe"]))
    if summary["pretrain"]:
        parts.append(
            "\nPre-training, last round (distance from the trivial solution: 0, nothing learned)\n"
        )
        parts.append(_pretrain_table(summary["pretrain"]))
    if summary["evaluation"]:
        parts.append(evaluation_text(summary["evaluation"]))
    return "\n".join(parts)


def probe_text(probes: dict[str, Any]) -> str:
    """A table each for z and h, and how well they tell domains apart."""
    parts = []
    for features, what in (("z", "the embedding z"), ("h", "the features h")):
        rows = [row for row in probes["domains"] if row["features"] == features]
        title = f"What {what} knows: held-out ridge-probe R2 of the simulator's state"
        parts.append(f"{title}\n\n{_probe_table(rows)}")
    for row in probes["separability"]:
        parts.append(
            f"Domain told from {row['features']} by a linear classifier: {row['init']:.1%} at "
            f"init, {row['trained']:.1%} trained, {row['by_chance']:.1%} by chance"
        )
    return "\n\n".join(parts)


def _probe_table(probes: list[dict[str, Any]]) -> str:
    """One line per domain, seen domains first, and the means."""
    columns = (
        "domain", "", "R2 at init", "R2", "gain", "rank at init", "rank", "retrieval at init",
        "retrieval", "by chance", "prototypes",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            p["domain"],
            "seen" if p["seen"] else "unseen",
            f"{p['init']['r2']:.3f}",
            f"{p['trained']['r2']:.3f}",
            f"{p['gain']:+.3f}",
            f"{p['init']['effective_rank']:.1f}",
            f"{p['trained']['effective_rank']:.1f}",
            _share(p["init"]["retrieval"]),
            _share(p["trained"]["retrieval"]),
            _share(p["retrieval_by_chance"]),
            str(p["prototypes_in_use"]),
        )
        for p in probes
    ]
    for seen, name in ((True, "seen"), (False, "unseen")):
        group = [p for p in probes if p["seen"] == seen]
        if group:
            init, trained = (
                float(np.mean([p[when]["r2"] for p in group])) for when in ("init", "trained")
            )
            gain = f"{trained - init:+.3f}"
            figures = (f"{init:.3f}", f"{trained:.3f}", gain)
            rows.append(("mean", name, *figures, *[""] * (len(columns) - 5)))
    return _table(columns, rows)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _pretrain_table(lines: list[dict[str, Any]]) -> str:
    columns = ("domain", "loss", "distance", "rank of z", "rank of h", "prototypes")
    rows: list[tuple[str, ...]] = [
        (
            line["domain"],
            f"{line['loss']:.3f}",
            f"{line['distance_from_trivial']:.3f}",
            f"{line['effective_rank']:.1f}",
            f"{line['effective_rank_h']:.1f}",
            f"{line['prototypes_in_use']:.0f}" if "prototypes_in_use" in line else "",
        )
        for line in lines
    ]
    return _table(columns, rows)


def evaluation_text(evaluation: dict[str, Any]) -> str:
    """Return of the policy beside that of random actions."""
    rows: list[tuple[str, ...]] = [
        (
            label,
            f"{evaluation[name]['return_mean']:.1f}",
            f"{evaluation[name]['return_std']:.1f}",
            str(evaluation[name]["episodes"]),
        )
        for name, label in (("policy", "fine-tuned policy"), ("random", "uniform random policy"))
    ]
    title = (
        f"\nReturn on {evaluation['task']} after {evaluation['agent_steps']} agent steps "
        "on the frozen encoder\n"
    )
    return title + "\n" + _table(("", "mean", "deviation", "episodes"), rows)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Text columns: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = []
    for row in [columns, tuple("-" * width for width in widths), *rows]:
        cells = [
            cell.ljust(width) if rows and rows[0][i][:1].isalpha() else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
