"""What a study has found, as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
Rows = Sequence[Row]

LEGEND = "R2 of z and its gain over init; bold: of a domain that was trained on."

# Heading, key of the figures, format.
GROUPS = (
    ("R2 of z, seen", "z_seen", "{:.3f}"),
    ("gain", "z_seen_gain", "{:+.3f}"),
    ("R2 of z, unseen", "z_unseen", "{:.3f}"),
    ("gain", "z_unseen_gain", "{:+.3f}"),
    ("R2 of h, seen", "h_seen", "{:.3f}"),
    ("unseen", "h_unseen", "{:.3f}"),
)
LOGGED = (
    ("rank of z", "effective_rank", "{:.0f}"),
    ("distance", "distance_from_trivial", "{:.2f}"),
    ("prototypes in use", "prototypes_in_use", "{:.0f}"),
    ("their mean cosine", "prototype_similarity_mean", "{:.3f}"),
    ("largest", "prototype_similarity_max", "{:.2f}"),
)


def by_variant(rows: Rows) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["variant"], []).append(row)
    return grouped


def domains_of(rows: Rows) -> list[str]:
    """All that were probed, those that some variant trained on first."""
    probed = list(dict.fromkeys(name for row in rows for name in row["z_domains"]))
    trained = {name for row in rows for name in row["trained_on"]}
    return sorted(probed, key=lambda name: name not in trained)


def unseen_by_all(rows: Rows) -> list[str]:
    """Probed in every run, and trained on in none."""
    return [
        name
        for name in domains_of(rows)
        if all(name in row["z_domains"] and name not in row["trained_on"] for row in rows)
    ]


def table(rows: Rows) -> str:
    """Means over seeds, with the deviation of the seeds where there are several.

    Means over seen and over unseen domains where these are the same for all variants, and can be
    compared; else the mean over the domains that no variant has trained on.
    """
    rows = [row | _unseen_by_all_figures(row, rows) for row in rows]
    one_set = len({tuple(sorted(row["trained_on"])) for row in rows}) == 1
    groups = GROUPS if one_set else _UNSEEN_BY_ALL
    columns = [c for c in (*groups, *LOGGED) if any(c[1] in row for row in rows)]
    domains = domains_of(rows)
    heads = ["variant", *(head for head, _, _ in columns)]
    heads += [head for name in domains for head in (name, "gain")]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for name, seeds in by_variant(rows).items():
        cells = [name, *(_cell([row.get(key) for row in seeds], form) for _, key, form in columns)]
        for domain in domains:
            seen = domain in seeds[0]["trained_on"]
            for key, form in (("z_domains", "{:.3f}"), ("z_gains", "{:+.3f}")):
                cell = _cell([row[key].get(domain) for row in seeds], form)
                cells.append(f"**{cell}**" if seen and cell else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_UNSEEN_BY_ALL = (
    ("R2 of z, unseen by all", "unseen_by_all", "{:.3f}"),
    ("gain", "unseen_by_all_gain", "{:+.3f}"),
)


def _unseen_by_all_figures(row: Row, rows: Rows) -> dict[str, float]:
    names = unseen_by_all(rows)
    if not names:
        return {}
    return {
        "unseen_by_all": float(np.mean([row["z_domains"][name] for name in names])),
        "unseen_by_all_gain": float(np.mean([row["z_gains"][name] for name in names])),
    }


def _cell(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = form.format(float(np.mean(known)))
    if len(known) == 1:
        return mean
    return f"{mean} ± {form.replace('+', '').format(float(np.std(known)))}"
