"""What a study has found, as a figure that answers its question."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crpt.ablate.report import Row, Rows, by_variant, domains_of, unseen_by_all
from crpt.files import replace_file

Draw = Callable[[Any, Rows], None]
"""Draws the runs of a study on a matplotlib figure."""

GAIN = "gain of z's held-out probe R2 over init"


def save(draw: Draw, rows: Rows, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(figure, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda draft: figure.savefig(draft, dpi=130, format="png"))


def curves_over(axis: str) -> Draw:
    """Probes, and how the prototypes are spread, against what the variants have on this axis."""
    return partial(_curves, axis=axis)


def _curves(figure: Any, rows: Rows, axis: str) -> None:
    figure.set_size_inches(10, 4)
    probes, coverage = figure.subplots(1, 2)
    for key, label in (("z_seen", "seen domains"), ("z_unseen", "unseen domains")):
        _curve(probes, rows, partial(_get, key=key), label=label)
    probes.set_ylabel("held-out probe R2 of z")
    for key, label in (
        ("prototype_similarity_mean", "mean cosine of two prototypes"),
        ("prototype_similarity_max", "largest"),
    ):
        _curve(coverage, rows, partial(_get, key=key), label=label)
    coverage.set_ylabel("similarity of prototypes")
    largest = max(row["x"] for row in rows)
    positive = [row["x"] for row in rows if row["x"] > 0]
    places = sorted({row["x"] for row in rows})
    for axes in (probes, coverage):
        if positive and largest > 10 * min(positive):
            axes.set_xscale("symlog", linthresh=min(positive))
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.set_xticks([], minor=True)
        axes.set_xlabel(axis)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)


def gains_over_domains(figure: Any, rows: Rows) -> None:
    """Each probed domain's gain against the number of domains trained on, filled where it is one
    of them; and the mean of those that no variant has trained on."""
    figure.set_size_inches(10, 5)
    axes = figure.subplots()
    for name in domains_of(rows):
        gain = partial(_gain, names=[name])
        _curve(axes, rows, gain, label=name, markerfacecolor="none")
        seen = [row for row in rows if name in row["trained_on"]]
        color = axes.lines[-1].get_color() if axes.lines else None
        _curve(axes, seen, gain, label="", color=color, linestyle="none")
    if unseen := unseen_by_all(rows):
        mean = partial(_gain, names=unseen)
        _curve(axes, rows, mean, label="mean of those never trained on", color="black")
    axes.axhline(0, color="black", linewidth=0.7)
    axes.set_xticks(sorted({row["x"] for row in rows}))
    axes.set_xlabel("domains trained on (filled: this domain is one of them)")
    axes.set_ylabel(GAIN)
    figure.legend(loc="outside right center", frameon=False)  # lines may be anywhere


def alone_and_together(figure: Any, rows: Rows) -> None:
    """A pair of bars for each probed domain: its gain when it is trained on alone, and when it is
    trained on with the others. For a domain that no variant has trained on: the mean over the
    encoders of one domain, and the encoder of all."""
    together = [row for row in rows if len(row["trained_on"]) > 1]
    alone = [row for row in rows if len(row["trained_on"]) == 1]
    names = domains_of(rows)
    never = unseen_by_all(rows)
    own = {n: alone if n in never else [r for r in alone if r["trained_on"] == [n]] for n in names}
    figure.set_size_inches(8, 1 + 0.5 * len(names))
    axes = figure.subplots()
    labels = [f"{name}\n(unseen: mean over one-domain encoders)" if name in never else name
              for name in names]  # fmt: skip
    series = {
        "one domain alone": [_per_seed(own[name], partial(_gain, names=[name])) for name in names],
        "all together": [_per_seed(together, partial(_gain, names=[name])) for name in names],
    }
    _bars(axes, labels, series)


def bars(figure: Any, rows: Rows) -> None:
    """Each variant's gains on seen and on unseen domains."""
    grouped = by_variant(rows)
    figure.set_size_inches(8, 1 + 0.3 * len(grouped))
    series = {
        f"{group} domains": [
            _known(seeds, partial(_get, key=f"z_{group}_gain")) for seeds in grouped.values()
        ]
        for group in ("seen", "unseen")
    }
    _bars(figure.subplots(), list(grouped), series)


def _bars(axes: Any, labels: list[str], series: dict[str, list[list[float]]]) -> None:
    """Means of the values of each label, with their deviation; a colour for each series."""
    at = np.arange(len(labels))
    for offset, (name, values) in zip((-0.2, 0.2), series.items(), strict=True):
        mean = [np.mean(v) if v else np.nan for v in values]
        spread = [np.std(v) if v else np.nan for v in values]
        axes.barh(at + offset, mean, 0.4, xerr=spread, label=name)
    axes.set_yticks(at, labels)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.7)
    axes.set_xlabel(GAIN)
    axes.legend(frameon=False)


def _curve(
    axes: Any, rows: Rows, value: Callable[[Row], float | None], *, label: str, **style: Any
) -> None:
    """Means over the seeds of each variant at its place, with their deviation."""
    grouped = [(seeds[0]["x"], _known(seeds, value)) for seeds in by_variant(rows).values()]
    known = [(x, values) for x, values in grouped if values]
    if known:
        x, y = zip(*known, strict=True)
        mean, spread = [np.mean(v) for v in y], [np.std(v) for v in y]
        axes.errorbar(x, mean, spread, **{"marker": "o", "capsize": 3, "label": label} | style)


def _get(row: Row, key: str) -> float | None:
    value: float | None = row.get(key)
    return value


def _gain(row: Row, names: list[str]) -> float | None:
    """The mean over these domains; None where one was not probed."""
    gains = [row["z_gains"].get(name) for name in names]
    return None if None in gains else float(np.mean(gains))


def _known(rows: Iterable[Row], value: Callable[[Row], float | None]) -> list[float]:
    return [found for row in rows if (found := value(row)) is not None]


def _per_seed(rows: Rows, value: Callable[[Row], float | None]) -> list[float]:
    """The mean over the runs of each seed."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    of_seeds = [_known((row for row in rows if row["seed"] == seed), value) for seed in seeds]
    return [float(np.mean(values)) for values in of_seeds if values]
