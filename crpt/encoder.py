"""The visual encoder f and its projector g: made by pre-training, used by all downstream."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from crpt.files import replace_files
from crpt.seeds import seeded
from crpt.standardisation import Standardisation, exactly

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
M = TypeVar("M", bound=nn.Module)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class EncoderFileError(ValueError):
    """A directory that does not hold an encoder this version can load."""


def orthogonal_init(module: nn.Module) -> None:
    """Orthogonal weights (ReLU gain for convolutions), zero biases."""
    if isinstance(module, nn.Conv2d):
        nn.init.orthogonal_(module.weight, nn.init.calculate_gain("relu"))
    elif isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class EncoderConfig:
    """Geometry of f and g (design: Conv 3x3, 32 channels, strides 2, 1, 1, 1; Linear to 128)."""

    in_channels: int = 9
    """Three RGB frames."""
    image_size: int = 84
    channels: int = 32
    strides: tuple[int, ...] = (2, 1, 1, 1)
    projection_dim: int = 128
    prototypes: int = 0
    """Prototypes that travel with the encoder; 0: none."""
    embedding_norm: Literal["none", "batch"] = "none"
    """batch: standardise each embedding dimension over the batch (running statistics in eval)
    before the unit length."""


def feature_map_size(config: EncoderConfig) -> int:
    """Height and width of h: 3x3 and stride s make of a size (size - 3) // s + 1."""
    size = config.image_size
    for stride in config.strides:
        size = (size - 3) // stride + 1
    if size < 1:
        raise ValueError(
            f"image_size should leave at least one pixel after the convolutions, got "
            f"{config.image_size}"
        )
    return size


class Encoder(nn.Module):
    """f and g: features h = f(obs / 255), embedding z = normalise(norm(g(h))).

    h has 32 * 35 * 35 = 39,200 dimensions for 84x84 observations, z has 128 and unit length
    (arXiv 2302.05614, section III). Orthogonal weights with ReLU gain, zero biases.
    """

    def __init__(self, config: EncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or EncoderConfig()
        size = feature_map_size(config)
        layers: list[nn.Module] = []
        channels = config.in_channels
        for stride in config.strides:
            layers += [
                nn.Conv2d(channels, config.channels, kernel_size=3, stride=stride),
                nn.ReLU(),
            ]
            channels = config.channels
        self.convolutions = nn.Sequential(*layers)
        self.feature_dim = channels * size * size
        # No bias under a norm: it would be subtracted again, and Adam would blow up the rounding
        # errors that are its gradient.
        standardised = config.embedding_norm == "batch"
        self.projector = nn.Linear(self.feature_dim, config.projection_dim, bias=not standardised)
        self.norm = Standardisation(config.projection_dim) if standardised else nn.Identity()
        self.prototypes: Tensor
        self.register_buffer("prototypes", torch.zeros(config.prototypes, config.projection_dim))
        self.frozen = False
        self.metadata: dict[str, Any] = {}
        self.apply(orthogonal_init)

    @property
    def frame_stack(self) -> int:
        """Consecutive frames that make an observation; where the metadata do not tell, RGB ones."""
        told: int | None = self.metadata.get("frame_stack")
        return max(1, self.config.in_channels // 3) if told is None else told

    @property
    def frame_channels(self) -> int:
        return self.config.in_channels // self.frame_stack

    def forward(self, obs: Tensor) -> Tensor:
        """features = f(obs / 255), uint8 [..., C, H, W] -> [..., feature_dim] in the dtype of the
        weights.

        Raises TypeError for another type or dtype and ValueError for another shape or device.
        """
        c = self.config
        if not isinstance(obs, Tensor):  # a NumPy array has a dtype, and even the name of this one
            raise TypeError(f"obs should be a torch.Tensor, got {type(obs).__name__}")
        if obs.dtype != torch.uint8:
            raise TypeError(f"obs should be uint8, got {obs.dtype}")
        if obs.dim() < 3 or obs.shape[-3:] != (c.in_channels, c.image_size, c.image_size):
            raise ValueError(
                f"obs should be [..., {c.in_channels}, {c.image_size}, {c.image_size}], got "
                f"{list(obs.shape)}"
            )
        weight = self.projector.weight
        if obs.device != weight.device:
            raise ValueError(
                f"obs should be on {weight.device}, as the encoder is, got one on {obs.device}"
            )
        pixels = obs.reshape(-1, *obs.shape[-3:]).to(weight.dtype) / 255
        h = self.features(pixels).reshape(*obs.shape[:-3], self.feature_dim)
        return self._without_gradient_if_frozen(h)

    def features(self, pixels: Tensor) -> Tensor:
        """h = f(pixels), float [B, C, H, W] in [0, 1] -> [B, feature_dim]."""
        h: Tensor = self.convolutions(pixels)
        # In the order of a contiguous [C, H, W], whatever the convolutions' memory format.
        return h.flatten(1)

    def project(self, features: Tensor) -> Tensor:
        """norm(g(h)), [B, feature_dim] in the dtype of the weights -> [B, projection_dim] in
        float32 (float64 for float64); not yet of unit length."""
        g = self.projector(features)
        # Statistics in float32 at least, whatever the precision of the layers before.
        projected: Tensor = self.norm(g.to(torch.promote_types(g.dtype, torch.float32)))
        return projected

    def embed(self, obs: Tensor) -> Tensor:
        """z = normalise(norm(g(f(obs / 255)))), uint8 [..., C, H, W] -> [..., D] in float32
        (float64 where the weights are)."""
        h = self(obs)
        z = self.embed_features(h.reshape(-1, self.feature_dim))
        z = z.reshape(*h.shape[:-1], self.config.projection_dim)
        return self._without_gradient_if_frozen(z)

    def embed_features(self, features: Tensor) -> Tensor:
        """z = normalise(norm(g(h))), [B, feature_dim] in the dtype of the weights ->
        [B, projection_dim] in float32 (float64 for float64)."""
        return F.normalize(self.project(features), dim=-1)

    def _without_gradient_if_frozen(self, x: Tensor) -> Tensor:
        """The weights of a frozen encoder ask for no gradient, unless a parent's requires_grad_()
        made them."""
        # Not by the grad mode: torch.export takes its switch along, and cannot load that again.
        return x.detach() if self.frozen else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        prototypes = self.prototypes
        cast(Any, super())._apply(fn, recurse)  # torch has no types for it
        self.prototypes = exactly(fn)(prototypes)  # they are compared with z
        return self

    def attach_prototypes(self, prototypes: Tensor) -> None:
        """Let the prototypes [M, D] travel with the encoder, rows scaled to unit length."""
        dim = self.config.projection_dim
        if prototypes.dim() != 2 or prototypes.shape[1] != dim:
            raise ValueError(f"prototypes should be [M, {dim}], got {list(prototypes.shape)}")
        self.prototypes = F.normalize(prototypes.detach(), dim=-1)
        self.config = dataclasses.replace(self.config, prototypes=len(prototypes))

    def freeze(self) -> Self:
        """Eval mode for good (also under a parent's `.train()`), no gradient."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def save_pretrained(
        self, directory: str | Path, metadata: dict[str, Any] | None = None
    ) -> None:
        """Write model.safetensors and config.json; `metadata` says how the encoder came about."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # Plain contiguous tensors: a channels-last weight would be stored transposed.
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        config = {
            "format_version": FORMAT_VERSION,
            "encoder": dataclasses.asdict(self.config),
            "metadata": metadata if metadata is not None else self.metadata,
        }
        text = json.dumps(config, indent=2) + "\n"
        # The config goes last: a directory that has one is whole. Not safetensors' own save_file,
        # whose temporary file has another name each time and stays after a kill.
        replace_files(
            {
                directory / WEIGHTS_FILE: lambda path: path.write_bytes(to_safetensors(state)),
                directory / CONFIG_FILE: lambda path: path.write_text(text),
            }
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, frozen: bool = True, *, revision: str | None = None
    ) -> Self:
        """Load an `encoder/` directory, a run directory that has one, or a repository of the
        Hugging Face Hub.

        Args:
            path: the directory; or, where there is none of that name, OWNER/NAME of a repository
                (needs `pip install "crpt[hub]"`).
            frozen: eval mode and no gradient, for good.
            revision: of the repository: a branch, tag or commit; none: its main branch.

        Raises:
            FileNotFoundError: there is no such directory or repository, or a file of it is missing.
            EncoderFileError: its files are damaged, or of another format version.
        """
        directory = Path(path)
        if not directory.exists() and _REPOSITORY.fullmatch(str(path)):
            directory = _download(str(path), revision)
        elif revision is not None:
            raise ValueError(f"revision should be none for a directory, got {revision!r}")
        if (directory / "encoder" / CONFIG_FILE).is_file():
            directory = directory / "encoder"  # a run directory
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory} should be an encoder directory with {CONFIG_FILE} and "
                    f"{WEIGHTS_FILE}, but {name} is missing"
                )
        try:
            saved = json.loads((directory / CONFIG_FILE).read_text())
            version = saved["format_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise EncoderFileError(
                f"{directory / CONFIG_FILE} should be the JSON that save_pretrained writes, and "
                f"is not ({error!r})"
            ) from error
        if version != FORMAT_VERSION:
            raise EncoderFileError(
                f"{directory} should have encoder format version {FORMAT_VERSION}, got {version}; "
                "load it with the crpt release that wrote it"
            )
        try:
            fields = dict(saved["encoder"])
            encoder = cls(EncoderConfig(**fields | {"strides": tuple(fields["strides"])}))
            encoder.load_state_dict(load_file(directory / WEIGHTS_FILE))
            encoder.metadata = saved["metadata"]
        except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise EncoderFileError(
                f"{directory} should hold an encoder, but its files are damaged or do not belong "
                f"together ({error}); export it again"
            ) from error
        return encoder.freeze() if frozen else encoder


def initial_encoder(config: EncoderConfig, seed: int) -> Encoder:
    """What pre-training with this seed begins with; torch's random state stays as it is."""
    with seeded(seed):
        return Encoder(dataclasses.replace(config, prototypes=0))


def _download(repository: str, revision: str | None) -> Path:
    """The files of a repository of the Hugging Face Hub, from its cache where they are there."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{repository} is no directory; if it is meant to be a repository of the Hugging Face "
            'Hub, install what fetches it: pip install "crpt[hub]"'
        ) from None
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]
            )
        )
    except Exception as error:
        raise FileNotFoundError(
            f"{repository} should be a directory with an encoder, or such a repository of the "
            f"Hugging Face Hub, which could not be fetched: {type(error).__name__}: {error}"
        ) from error


def on_device(module: M, device: torch.device | str) -> M:
    """The module there, weights of convolutions channels-last: so they are fastest."""
    # torch's stubs know no memory_format here.
    moved: M = cast(Any, module).to(device, memory_format=torch.channels_last)
    return moved


def has_encoder(directory: Path) -> bool:
    return all((directory / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))
