"""The tables and figures of the ablations, on runs whose figures are known."""

import pytest
from matplotlib.figure import Figure

from crpt.ablate import pictures, report
from crpt.ablate.studies import STUDIES


def found(variant, trained_on, gains, seed=0, x=None):
    """What a run would have left, init's R2 being 0.1 everywhere."""
    figures = {"variant": variant, "x": x, "seed": seed, "trained_on": trained_on}
    groups = {"seen": trained_on, "unseen": [name for name in gains if name not in trained_on]}
    for group, names in groups.items():
        mean = sum(gains[name] for name in names) / len(names)
        figures |= {f"z_{group}": 0.1 + mean, f"z_{group}_gain": mean}
    return figures | {"z_gains": gains, "z_domains": {n: 0.1 + g for n, g in gains.items()}}


def drawn(draw, rows):
    figure = Figure()
    draw(figure, rows)
    return figure.axes


def lines_of(axes):
    """What is drawn by label: means, and their deviations."""
    lines = {}
    for container in axes.containers:
        line, _, (deviations,) = container
        ends = [segment[:, 1] for segment in deviations.get_segments()]
        points = dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        lines[container.get_label()] = points, [(high - low) / 2 for low, high in ends]
    return lines


def bars_of(axes):
    labels = [text.get_text().partition("\n")[0] for text in axes.get_yticklabels()]
    return {
        c.get_label(): dict(zip(labels, (bar.get_width() for bar in c), strict=True))
        for c in axes.containers
        if c.get_label() in ("one domain alone", "all together", "seen domains", "unseen domains")
    }


def test_curves_show_means_and_deviations_over_the_seeds():
    rows = [
        found(f"alpha_{x}", ["a"], {"a": x + 0.2 * seed, "b": 2 * x}, seed, x)
        for x in (0.0, 0.1)
        for seed in (0, 1)
    ]
    for row in rows:
        row |= {"prototype_similarity_mean": -row["x"], "prototype_similarity_max": 0.5}
    probes, coverage = drawn(STUDIES["alpha"].draw, rows)
    seen, deviations = lines_of(probes)["seen domains"]
    assert seen == pytest.approx({0.0: 0.2, 0.1: 0.3})
    assert deviations == pytest.approx([0.1, 0.1])
    assert lines_of(probes)["unseen domains"][0] == pytest.approx({0.0: 0.1, 0.1: 0.3})
    mean, _ = lines_of(coverage)["mean cosine of two prototypes"]
    assert mean == pytest.approx({0.0: 0.0, 0.1: -0.1})
    assert lines_of(coverage)["largest"][0] == pytest.approx({0.0: 0.5, 0.1: 0.5})


def test_every_variant_has_a_mark_on_a_logarithmic_axis():
    rows = [found(str(x), ["a"], {"a": 0.1, "b": 0.1}, x=x) for x in (0, 250, 500, 4_000)]
    for axes in drawn(STUDIES["transitions"].draw, rows):
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "250", "500", "4000"]


def test_more_domains_are_judged_domain_by_domain():
    """The mean over the domains that are trained on is that of other domains in every variant:
    equal gains of each domain are level curves."""
    level = {"a": 0.6, "b": 0.1, "c": 0.3, "d": 0.2, "e": 0.4}
    rows = [
        found(f"domains_{n}", ["a", "b", "c"][:n], level, seed, n)
        for n in (1, 2, 3)
        for seed in (0, 1)
    ]
    (axes,) = drawn(STUDIES["domains"].draw, rows)
    curves = lines_of(axes)
    for name, gain in level.items():
        assert curves[name][0] == pytest.approx({1: gain, 2: gain, 3: gain})
    assert curves["mean of those never trained on"][0] == pytest.approx({1: 0.3, 2: 0.3, 3: 0.3})
    filled = [line for line in axes.lines if line.get_linestyle() == "None"]
    at = [line.get_xdata() for line in filled if line.get_marker() == "o"]
    assert [list(x) for x in at] == [[1, 2, 3], [2, 3], [3]]
    lines = report.table(rows).splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")]
    assert heads[1:] == [
        "variant", "R2 of z, unseen by all", "gain", "a", "gain", "b", "gain", "c", "gain",
        "d", "gain", "e", "gain", "",
    ]  # fmt: skip
    second = [cell.strip() for cell in lines[3].split("|")]
    assert second[1:4] == ["domains_2", "0.400 ± 0.000", "+0.300 ± 0.000"]
    assert second[6:10] == ["**0.200 ± 0.000**", "**+0.100 ± 0.000**", "0.400 ± 0.000",
                            "+0.300 ± 0.000"]  # fmt: skip


def test_each_domain_alone_is_beside_itself_among_all():
    gains = {  # of a, b and the unseen c, by what is trained on
        "a": {"a": 0.5, "b": 0.1, "c": 0.0},
        "b": {"a": 0.2, "b": 0.3, "c": 0.2},
        "all_domains": {"a": 0.6, "b": 0.2, "c": 0.4},
    }
    rows = [
        found(name, ["a", "b"] if name == "all_domains" else [name], of, seed)
        for name, of in gains.items()
        for seed in (0, 1)
    ]
    (axes,) = drawn(STUDIES["single"].draw, rows)
    assert bars_of(axes) == {
        "one domain alone": pytest.approx({"a": 0.5, "b": 0.3, "c": 0.1}),
        "all together": pytest.approx({"a": 0.6, "b": 0.2, "c": 0.4}),
    }
    assert "mean over one-domain encoders" in axes.get_yticklabels()[2].get_text()
    assert "seen |" not in report.table(rows)


def test_variants_have_a_bar_each_for_seen_and_unseen():
    rows = [found("one", ["a"], {"a": 0.5, "b": 0.1}), found("two", ["a"], {"a": 0.4, "b": -0.2})]
    (axes,) = drawn(STUDIES["components"].draw, rows)
    assert bars_of(axes) == {
        "seen domains": pytest.approx({"one": 0.5, "two": 0.4}),
        "unseen domains": pytest.approx({"one": 0.1, "two": -0.2}),
    }
    heads = report.table(rows).splitlines()[0].replace(" | gain", "+")
    assert heads == "| variant | R2 of z, seen+ | R2 of z, unseen+ | a+ | b+ |"


@pytest.mark.parametrize("name", STUDIES)
def test_a_figure_is_written(name, tmp_path):
    rows = [
        found(f"domains_{n}", ["a", "b"][:n], {"a": 0.1 * n, "b": 0.2 * seed, "c": 0.3}, seed, n)
        for n in (1, 2)
        for seed in (0, 1)
    ]
    pictures.save(STUDIES[name].draw, rows, tmp_path / "figures" / "a.png")
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")
