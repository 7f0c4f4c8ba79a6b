import copy
import inspect
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import crpt
from crpt.encoder import (
    Encoder,
    EncoderConfig,
    EncoderFileError,
    has_encoder,
    initial_encoder,
)
from crpt.files import DiskFullError
from crpt.model_card import write_card

SMALL = EncoderConfig(image_size=20, projection_dim=16)
PRECISIONS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def observations(*shape: int, size: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 9, size, size), dtype=torch.uint8, generator=generator)


def test_the_paper_s_geometry():
    encoder = Encoder()
    assert encoder.feature_dim == 39_200
    assert encoder.projector.weight.shape == (128, 39_200)
    h = encoder(observations(2, size=84))
    assert h.shape == (2, 39_200)
    assert (h >= 0).all()  # the last ReLU


def test_weights_are_orthogonal_with_relu_gain_and_biases_zero():
    encoder = Encoder(SMALL)
    for layer in encoder.convolutions:
        if isinstance(layer, torch.nn.Conv2d):
            w = layer.weight.detach().flatten(1).double()
            torch.testing.assert_close(w @ w.T, 2.0 * torch.eye(32).double(), atol=1e-5, rtol=0)
            assert not layer.bias.any()
    w = encoder.projector.weight.detach().double()
    torch.testing.assert_close(w @ w.T, torch.eye(16).double(), atol=1e-5, rtol=0)


def test_features_are_those_of_the_scaled_pixels_whatever_the_memory_format():
    encoder = Encoder(SMALL).eval()
    obs = observations(3)
    expected = obs.float() / 255
    for layer in encoder.convolutions:
        expected = layer(expected)
    h = encoder(obs)
    torch.testing.assert_close(h, expected.reshape(3, -1))
    encoder.to(memory_format=torch.channels_last)
    torch.testing.assert_close(encoder(obs), h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,)])
def test_any_leading_dimensions(lead):
    encoder = Encoder(SMALL).freeze()
    obs = observations(*lead)
    assert encoder(obs).shape == (*lead, encoder.feature_dim)
    z = encoder.embed(obs)
    assert z.shape == (*lead, 16)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(lead))


@pytest.mark.parametrize(
    ("obs", "error", "message"),
    [
        (torch.zeros(2, 9, 20, 20), TypeError, "obs should be uint8, got torch.float32"),
        (np.zeros((9, 20, 20), np.uint8), TypeError, "obs should be a torch.Tensor, got ndarray"),
        (
            observations(2)[..., :19],
            ValueError,
            r"obs should be \[..., 9, 20, 20\], got \[2, 9, 20, 19\]",
        ),
        (observations(2)[0, 0], ValueError, r"obs should be \[..., 9, 20, 20\], got \[20, 20\]"),
        (
            observations(2).to("meta"),
            ValueError,
            "obs should be on cpu, as the encoder is, got one on meta",
        ),
    ],
)
def test_wrong_observations_are_named(obs, error, message):
    with pytest.raises(error, match=message):
        Encoder(SMALL)(obs)


def test_an_image_too_small_for_the_convolutions_is_an_error():
    with pytest.raises(ValueError, match="image_size should leave at least one pixel"):
        Encoder(EncoderConfig(image_size=14))


def test_frozen_stays_frozen_inside_a_module_in_training():
    encoder = Encoder(EncoderConfig(image_size=20, projection_dim=16, embedding_norm="batch"))
    parent = torch.nn.Sequential(encoder.freeze()).train()
    assert not any(module.training for module in encoder.modules())
    before = encoder.norm.running_mean.clone()
    z = parent[0].embed(observations(4))
    assert not z.requires_grad
    assert torch.equal(encoder.norm.running_mean, before)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_frozen_encoder_keeps_nothing_for_a_gradient():
    encoder = Encoder(SMALL).freeze()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        encoder.embed(observations(4))
    assert not kept
    torch.nn.Sequential(encoder).requires_grad_(True)  # a parent that knows nothing of it
    assert not encoder(observations(4)).requires_grad
    assert not encoder.embed(observations(4)).requires_grad


def test_an_unfrozen_encoder_can_be_trained_further():
    encoder = Encoder(SMALL)
    encoder.embed(observations(4))[:, 0].sum().backward()
    assert encoder.projector.weight.grad is not None


def test_save_and_load_give_the_same_features_bit_for_bit(tmp_path):
    encoder = Encoder(EncoderConfig(image_size=20, projection_dim=16, embedding_norm="batch"))
    encoder.embed(observations(8))  # moves the running statistics
    encoder.attach_prototypes(torch.randn(5, 16))
    encoder.to(memory_format=torch.channels_last)
    encoder.save_pretrained(tmp_path / "encoder", metadata={"domains": ["a"]})
    loaded = crpt.Encoder.from_pretrained(tmp_path / "encoder")
    assert loaded.frozen
    assert loaded.metadata == {"domains": ["a"]}
    torch.testing.assert_close(loaded.prototypes.norm(dim=-1), torch.ones(5))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    obs = observations(3)
    assert torch.equal(
        loaded.to(memory_format=torch.channels_last).embed(obs), encoder.freeze().embed(obs)
    )
    # A run directory is as good as the encoder directory in it.
    assert torch.equal(Encoder.from_pretrained(tmp_path).prototypes, encoder.prototypes)


@pytest.mark.parametrize("shape", [(5, 8), (16,), (2, 5, 16)])
def test_prototypes_that_do_not_fit_are_named(shape):
    encoder = Encoder(SMALL)
    with pytest.raises(ValueError, match=r"prototypes should be \[M, 16\], got \["):
        encoder.attach_prototypes(torch.randn(shape))
    assert encoder.config == SMALL


def test_thawed_on_request(tmp_path):
    Encoder(SMALL).save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, frozen=False)
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, missing):
    Encoder(SMALL).save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"but {missing} is missing"):
        Encoder.from_pretrained(tmp_path)


def test_saving_over_an_encoder_never_leaves_a_mixture(tmp_path, monkeypatch):
    old, new = (initial_encoder(SMALL, seed) for seed in (1, 2))
    old.save_pretrained(tmp_path, metadata={"seed": 1})

    def full(state):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(crpt.encoder, "to_safetensors", full)
        with pytest.raises(DiskFullError, match=r"model\.safetensors could not be written"):
            new.save_pretrained(tmp_path, metadata={"seed": 2})
    loaded = Encoder.from_pretrained(tmp_path)
    assert loaded.metadata == {"seed": 1}
    assert torch.equal(loaded.projector.weight, old.projector.weight)

    replace = os.replace

    def stopped_before_the_config(source, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped_before_the_config)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path, metadata={"seed": 2})
    assert not has_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"but config\.json is missing"):
        Encoder.from_pretrained(tmp_path)


def _another_version(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"format_version": 99}))


def _foreign_json(path):
    (path / "config.json").write_text('{"architectures": ["ViT"]}')


def _not_json(path):
    (path / "config.json").write_text("not json")


def _truncated_weights(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


def _other_weights(path):
    save_file({"w": torch.zeros(3)}, path / "model.safetensors")


def _unknown_field(path):
    config = json.loads((path / "config.json").read_text())
    config["encoder"]["depth"] = 3
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_another_version, "should have encoder format version 1, got 99"),
        (_foreign_json, "should be the JSON that save_pretrained writes"),
        (_not_json, "should be the JSON that save_pretrained writes"),
        (_truncated_weights, "damaged or do not belong together"),
        (_other_weights, "damaged or do not belong together"),
        (_unknown_field, "damaged or do not belong together"),
    ],
)
def test_damaged_directories_are_told_apart(tmp_path, damage, message):
    Encoder(SMALL).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(EncoderFileError, match=message):
        Encoder.from_pretrained(tmp_path)


def test_initial_encoder_depends_on_the_seed_alone_and_leaves_torch_s_own_state(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # what torch.manual_seed calls
    state = torch.random.get_rng_state()
    first, again, other = (initial_encoder(SMALL, seed) for seed in (1, 1, 2))
    assert torch.equal(first.projector.weight, again.projector.weight)
    assert not torch.equal(first.projector.weight, other.projector.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_has_encoder(tmp_path):
    assert not has_encoder(tmp_path)
    Encoder(SMALL).save_pretrained(tmp_path)
    assert has_encoder(tmp_path)


def standardised(norm: str) -> Encoder:
    """A frozen encoder, with running statistics of its own under `batch`."""
    encoder = Encoder(replace(SMALL, embedding_norm=norm))
    for _ in range(20):
        encoder.embed(observations(8))
    return encoder.freeze()


@pytest.mark.parametrize("method", ["forward", "embed"])
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_weights_of_every_precision(dtype, norm, method):
    encoder, obs = standardised(norm), observations(4)
    exact = getattr(copy.deepcopy(encoder).double(), method)(obs)
    found = getattr(encoder.to(dtype), method)(obs)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    assert found.dtype == (dtype if method == "forward" else at_least_float32)
    error = (found - exact).norm() / exact.norm()
    assert error < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_encoders_of_every_precision_can_be_trained_further(dtype):
    encoder = Encoder(replace(SMALL, embedding_norm="batch")).to(dtype)
    before = encoder.norm.running_var.clone()
    encoder.embed(observations(4))[:, 0].sum().backward()
    assert encoder.projector.weight.grad.isfinite().all()
    assert not torch.equal(encoder.norm.running_var, before)


def test_running_statistics_lose_nothing_in_half_precision():
    encoder = standardised("batch")
    before = encoder.norm.running_var.clone()
    for cast in (encoder.half, encoder.bfloat16, encoder.double, encoder.half, encoder.float):
        assert torch.equal(cast().norm.running_var.float(), before)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_prototypes_are_compared_with_z_in_every_precision(dtype):
    encoder = standardised("batch")
    encoder.attach_prototypes(torch.randn(5, encoder.config.projection_dim))
    exact = encoder.prototypes
    encoder.to(dtype)
    assert (encoder.embed(observations(3)) @ encoder.prototypes.T).shape == (3, 5)
    assert torch.equal(encoder.prototypes, exact.to(encoder.prototypes.dtype))


class Embed(torch.nn.Module):
    """What torch.export takes where a method other than forward is wanted."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.encoder.embed(obs)


@pytest.mark.parametrize("sizes", [(4,), (4, 1, 7)], ids=["static", "dynamic"])
@pytest.mark.parametrize("method", ["forward", "embed"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_an_exported_program_is_saved_and_loaded(tmp_path, norm, method, sizes):
    encoder = Encoder(EncoderConfig(image_size=20, projection_dim=16, embedding_norm=norm))
    encoder.freeze()
    module = encoder if method == "forward" else Embed(encoder)
    shapes = ({0: torch.export.Dim("B", min=1)},) if len(sizes) > 1 else None
    program = torch.export.export(module, (observations(4),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    for size in sizes:
        obs = observations(size)
        torch.testing.assert_close(loaded(obs), getattr(encoder, method)(obs))


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("method", ["forward", "embed"])
def test_torch_compile_without_a_graph_break(method, norm):
    encoder = Encoder(EncoderConfig(image_size=20, projection_dim=16, embedding_norm=norm))
    encoder.freeze()
    compiled = torch.compile(getattr(encoder, method), fullgraph=True, backend="aot_eager")
    obs = observations(3)
    torch.testing.assert_close(compiled(obs), getattr(encoder, method)(obs))


def test_half_precision_is_exported_and_compiled():
    encoder, obs = standardised("batch").to(torch.bfloat16), observations(3)
    exported = torch.export.export(Embed(encoder), (obs,)).module()
    compiled = torch.compile(encoder.embed, fullgraph=True, backend="aot_eager")
    for embed in (exported, compiled):
        torch.testing.assert_close(embed(obs), encoder.embed(obs))


class Hub:
    """Stands where huggingface_hub would be imported from."""

    def __init__(self, directory=None):
        self.directory = directory
        self.calls = []

    def snapshot_download(self, repository, **options):
        self.calls.append((repository, options))
        if self.directory is None:
            raise ConnectionError("no route")
        return str(self.directory)


def test_a_repository_is_fetched_from_the_hub(tmp_path, monkeypatch):
    saved = Encoder(SMALL)
    saved.save_pretrained(tmp_path / "snapshot")
    hub = Hub(tmp_path / "snapshot")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    loaded = Encoder.from_pretrained("someone/encoder", revision="v1")
    assert torch.equal(loaded.projector.weight, saved.projector.weight)
    ((repository, options),) = hub.calls
    assert repository == "someone/encoder"
    assert options["revision"] == "v1"
    assert set(options["allow_patterns"]) == {"config.json", "model.safetensors"}


def test_the_hub_s_client_takes_what_it_is_called_with():
    client = pytest.importorskip("huggingface_hub")
    patterns = ["config.json", "model.safetensors"]
    inspect.signature(client.snapshot_download).bind(
        "someone/encoder", revision="v1", allow_patterns=patterns
    )


def test_a_directory_comes_before_a_repository_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub())
    monkeypatch.chdir(tmp_path)
    Encoder(SMALL).save_pretrained("someone/encoder")
    assert Encoder.from_pretrained("someone/encoder").frozen
    with pytest.raises(ValueError, match="revision should be none for a directory"):
        Encoder.from_pretrained("someone/encoder", revision="v1")


def test_what_cannot_be_fetched_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub())
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*ConnectionError: no route"):
        Encoder.from_pretrained("nobody/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install \"crpt\[hub\]\""):
        Encoder.from_pretrained("nobody/nothing")


def test_the_card_tells_what_a_user_asks(tmp_path):
    encoder = Encoder(SMALL)
    encoder.attach_prototypes(torch.randn(5, 16))
    encoder.metadata = {"objective": "byol", "domains": ["a", "b"], "seed": 3, "render": None}
    write_card(encoder, tmp_path)
    text = (tmp_path / "README.md").read_text()
    for words in (
        "library_name: crpt",
        "uint8 [..., 9, 20, 20]",
        "5 prototypes",
        "| objective | byol |",
        "| domains | a, b |",
        "| seed | 3 |",
        "from_pretrained",
    ):
        assert words in text
    assert "rendering" not in text
    assert "What it knows" not in text
