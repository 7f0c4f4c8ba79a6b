"""What the probes say of encoders whose knowledge is known."""

import json
import math
from dataclasses import replace

import dot_env
import numpy as np
import pytest
import small
import torch
from matplotlib.figure import Figure
from torch import Tensor

from crpt import figures
from crpt.encoder import Encoder, EncoderConfig
from crpt.measures import effective_rank, temporal_retrieval
from crpt.probe import knowledge, probe, to_json
from crpt.probe.knowledge import measure
from crpt.probe.ridge import OF_GRAM, held_out_r2
from crpt.summary import probe_text

SEEN = ("dot_red", "dot_blue")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    config = small.replace_domains(small.COLLECT, ("dot_red", "dot_blue", "dot_green"))
    return small.dataset(tmp_path_factory.mktemp("probe") / "dataset", config)


class Knowing(Encoder):
    """Sees where the dot is and what its tint is: the brightness-weighted position, and the mean of
    each colour."""

    def features(self, pixels: Tensor) -> Tensor:
        frame = pixels[:, -3:]
        light = (frame - 20 / 255).clamp(min=0)
        grid = torch.linspace(-1.2, 1.2, frame.shape[-1])
        mass = light.sum((1, 2, 3)) + 1e-6
        x = (light * grid).sum((1, 2, 3)) / mass
        y = (light * grid[:, None]).sum((1, 2, 3)) / mass
        tint = light.amax((2, 3)) / light.amax((1, 2, 3))[:, None]
        known = torch.cat([x[:, None], y[:, None], tint], dim=1)
        return torch.nn.functional.pad(known, (0, self.feature_dim - known.shape[1]))

    def embed_features(self, features: Tensor) -> Tensor:
        return features[:, :16]


def knowing() -> Encoder:
    torch.manual_seed(0)
    return Knowing(EncoderConfig(image_size=dot_env.SIZE, projection_dim=16))


def blind() -> Encoder:
    encoder = knowing()
    encoder.features = lambda pixels: torch.zeros(len(pixels), encoder.feature_dim)
    return encoder


@pytest.fixture(scope="module")
def result(dataset):
    return probe(small.PROBE, dataset, knowing(), blind(), seen=SEEN, progress=False)


def test_seen_domains_come_first_for_z_then_for_h(result):
    assert [(row.features, row.domain, row.seen) for row in result.domains] == [
        (features, domain, domain in SEEN)
        for features in ("z", "h")
        for domain in ("dot_blue", "dot_red", "dot_green")
    ]


def test_who_sees_the_state_is_told_from_who_sees_nothing(result):
    for row in result.domains:
        assert row.trained.r2 > 0.8, row
        assert row.init.r2 < 0.05, row
        assert row.gain == row.trained.r2 - row.init.r2
        assert row.init.effective_rank == 0.0
        assert 1.5 < row.trained.effective_rank < 6


def test_domains_are_told_apart_by_who_sees_their_tint(result):
    assert [row.features for row in result.separability] == ["z", "h"]
    for row in result.separability:
        assert row.trained > 0.95
        assert row.init < 0.5
        assert row.by_chance == pytest.approx(1 / 3)


def test_moments_near_in_time_are_found_more_often_than_by_chance(result):
    for row in result.domains:
        assert 0 < row.retrieval_by_chance < 0.2
        assert row.trained.retrieval > row.retrieval_by_chance


def test_the_figures_go_to_json(result):
    content = to_json(result)
    assert set(content) == {"domains", "separability"}
    row = content["domains"][0]
    assert row["gain"] == row["trained"]["r2"] - row["init"]["r2"]
    assert row["prototypes_in_use"] == 0


def test_the_table_sets_retrieval_beside_what_chance_would_find(result):
    table = probe_text(to_json(result)).split("\n\n")[1].splitlines()
    heading, _, *rows = table
    end = heading.index("by chance") + len("by chance")
    for row, line in zip(result.domains[:3], rows[:3], strict=True):
        assert line.split()[0] == row.domain
        assert line[:end].endswith(f" {row.retrieval_by_chance:.1%}")
        assert line[: end - len("  by chance")].endswith(f" {row.trained.retrieval:.1%}")


def test_embeddings_are_those_of_the_frames(dataset, result):
    slots = np.concatenate(dataset.episodes("dot_green"))
    obs = dataset.observations("dot_green", slots)
    torch.testing.assert_close(result.z["dot_green"], knowing().freeze().embed(obs))


def test_all_of_h_is_measured(dataset):
    """More dimensions than frames, and the state in few of them."""
    encoder = small.new_encoder(small.PRETRAIN).freeze()
    known = measure(small.PROBE, dataset, encoder, ("dot_red",), frame_stack=3, progress=False)
    episodes = dataset.episodes("dot_red")
    slots, episode = np.concatenate(episodes), np.repeat(np.arange(10), 13)
    h = encoder(dataset.observations("dot_red", slots)).double()
    assert h.shape[1] > len(h)
    figures = known.figures["h", "dot_red"]
    assert figures.effective_rank == pytest.approx(effective_rank(h), rel=1e-6)
    assert figures.retrieval == temporal_retrieval(h, torch.from_numpy(episode))[0]
    states = np.asarray(dataset.arrays("dot_red")["states"][slots])
    r2 = held_out_r2((h @ h.T).numpy(), states, episode, small.PROBE.folds, OF_GRAM)
    assert figures.r2 == pytest.approx(float(r2.mean()), rel=1e-9)


def test_a_domain_has_the_same_figures_beside_others_or_alone(dataset, result):
    alone = measure(small.PROBE, dataset, knowing(), ("dot_red",), frame_stack=3, progress=False)
    for row in result.domains:
        if row.domain == "dot_red":
            assert alone.figures[row.features, "dot_red"] == row.trained


def test_domains_are_told_apart_by_some_frames_of_many(dataset, monkeypatch):
    monkeypatch.setattr(knowledge, "SOME_FRAMES", 100)  # every fourth
    frames = []
    monkeypatch.setattr(
        knowledge, "held_out_accuracy", lambda x, label, *_: frames.append(len(label)) or 1.0
    )
    measure(small.PROBE, dataset, knowing(), dataset.domains, frame_stack=3, progress=False)
    assert frames == [390, 3 * 33]


def test_one_domain_has_no_others_to_be_told_from(tmp_path):
    dataset = small.dataset(
        tmp_path / "dataset", small.replace_domains(small.COLLECT, ("dot_red",))
    )
    alone = probe(small.PROBE, dataset, knowing(), blind(), seen=SEEN, progress=False)
    assert alone.separability == []
    assert len(alone.domains) == 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.nan, "states of dot_red should be finite, got 1 steps that are not"),
        (7.0, "states of dot_red should vary, .* got one state in all 130 steps"),
    ],
)
def test_states_that_say_nothing_are_named(tmp_path, state, message):
    dataset = small.dataset(
        tmp_path / "dataset", small.replace_domains(small.COLLECT, ("dot_red",))
    )
    states = np.load(tmp_path / "dataset" / "dot_red" / "states.npy", mmap_mode="r+")
    states[5 if np.isnan(state) else slice(None)] = state
    with pytest.raises(ValueError, match=message):
        probe(small.PROBE, dataset, knowing(), blind(), seen=SEEN, progress=False)


def test_what_is_known_at_init_need_not_be_measured_again(dataset, result):
    known = measure(small.PROBE, dataset, blind(), dataset.domains, frame_stack=3, progress=False)
    again = probe(small.PROBE, dataset, knowing(), known, seen=SEEN, progress=False)
    assert (again.domains, again.separability) == (result.domains, result.separability)
    message = "initial should be what is known of dot_red, got it of dot_blue, dot_green, dot_red"
    with pytest.raises(ValueError, match=message):
        probe(small.PROBE, dataset, knowing(), known, seen=SEEN, domains=("dot_red",))


def test_what_could_not_be_measured_is_no_number(result):
    figures = replace(result.domains[0].trained, retrieval=math.nan)
    rows = [replace(result.domains[0], trained=figures), *result.domains[1:]]
    content = to_json(replace(result, domains=rows))
    assert content["domains"][0]["trained"]["retrieval"] is None
    json.dumps(content, allow_nan=False)
    assert " -  " in probe_text(content).splitlines()[4]


def test_the_map_is_a_picture(result, tmp_path):
    path = tmp_path / "figures" / "probe.png"
    figures.domain_map(result.z, torch.randn(8, 16), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir()] == ["probe.png"]


def test_the_map_shows_every_domain_and_the_prototypes(monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(2)
    z = {name: torch.randn(n, 16, generator=generator) for name, n in (("a", 40), ("b", 2_500))}
    prototypes = torch.randn(8, 16, generator=generator)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kw: drawn.append(figure))
    monkeypatch.setattr("crpt.files.replace_file", lambda path, write: write(path))
    figures.domain_map(z, prototypes, tmp_path / "probe.png")
    figures.domain_map(z, prototypes[:0], tmp_path / "probe.png")
    (axes,), (bare,) = (figure.axes for figure in drawn)
    clouds = {cloud.get_label(): np.asarray(cloud.get_offsets()) for cloud in axes.collections}
    assert {name: len(cloud) for name, cloud in clouds.items()} == {
        "a": 40, "b": 834, "prototypes": 8,
    }  # fmt: skip
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(clouds)
    # A plane of orthonormal directions: distances there are at most what they were, and most of
    # them more than nothing.
    flat, full = (np.linalg.norm(x[0] - x[1:], axis=1) for x in (clouds["a"], z["a"].numpy()))
    assert (flat < full + 1e-5).all()
    assert np.median(flat) > 0.5
    shown = np.linalg.norm(clouds["prototypes"][:, None] - clouds["a"], axis=-1)
    assert (shown < torch.cdist(prototypes, z["a"]).numpy() + 1e-5).all()
    assert [cloud.get_label() for cloud in bare.collections] == ["a", "b"]


def test_without_matplotlib_the_remedy_is_named(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not figures.available(tmp_path / "probe.png")
    assert "pip install" in caplog.text
