"""What pre-training checks of its data, and settles of its config, before it begins."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import torch

from crpt.byte_encoder import bytes_are_faster
from crpt.config import PretrainConfig
from crpt.distributed import Team
from crpt.encoder import Encoder
from crpt.pretrain.turns import Turns
from crpt.replay import ReplayBuffer
from crpt.replay.together import name_of

_LOOKED_AT = 32  # transitions of a domain

_log = logging.getLogger(__name__)


def precision_on(
    config: PretrainConfig, encoder: Encoder, device: torch.device
) -> Literal["fp32", "bf16"]:
    """auto: bf16 where a GPU has units for it, or a CPU has them and kernels for the encoder."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        modern = bytes_are_faster(encoder, device)
    return "bf16" if modern else "fp32"


def dataset_identity(buffer: ReplayBuffer) -> dict[str, dict[str, Any]]:
    """What tells one dataset from another, and from itself after it has grown: what is told of it,
    and a digest of what each domain holds."""
    described = {k: buffer.metadata.get(k) for k in ("seed", "render", "action_repeat")}
    if "seeds" in buffer.metadata:  # of several
        described["seeds"] = buffer.metadata["seeds"]
    domains = sorted(buffer.domains)
    return {
        "dataset": described | {domain: buffer.num_transitions(domain) for domain in domains},
        "dataset_content": {domain: _digest(buffer, domain) for domain in domains},
    }


def _digest(buffer: ReplayBuffer, domain: str) -> str:
    """Of actions and frames of a few transitions, spread over the domain in the order in which they
    came: some hundred KB, also of terabytes, and the same wherever in the ring they lie."""
    found = buffer.indices(domain)
    # In the middle of equal parts: the oldest are those that a writer is about to overwrite.
    n = len(found)
    slots = found[[(2 * i + 1) * n // (2 * _LOOKED_AT) for i in range(_LOOKED_AT if n else 0)]]
    arrays = buffer.arrays(domain)
    digest = 0
    for name in ("frames", "actions"):
        digest = zlib.crc32(arrays[name][slots].tobytes(), digest)
    return f"{digest:08x}"


def frame_geometry(buffer: ReplayBuffer, domains: tuple[str, ...]) -> tuple[int, int]:
    """Channels and size of the square frames that all domains share."""
    if not domains:
        raise ValueError("buffer should hold at least one domain, got none")
    shapes = {domain: buffer.spec(domain).frame_shape for domain in domains}
    channels, height, width = shapes[domains[0]]
    if height != width or len(set(shapes.values())) > 1:
        got = ", ".join(f"{domain} {list(shape)}" for domain, shape in shapes.items())
        raise ValueError(f"frames of all domains should be of one shape [C, S, S], got {got}")
    return channels, height


def check_sizes(
    config: PretrainConfig, buffer: ReplayBuffer, domains: tuple[str, ...], team: Team
) -> None:
    """ValueError unless batches of that size can be drawn, and shared by the team."""
    found = {d: len(buffer.indices(d, frame_stack=config.frame_stack)) for d in domains}
    check_counts(config, found, processes=team.size)


def check_counts(
    config: PretrainConfig, transitions: Mapping[str, int], *, processes: int = 1
) -> None:
    """`check_sizes` of a dataset of domains with so many transitions each."""
    least = config.frame_stack
    short = ", ".join(f"{domain} {n}" for domain, n in transitions.items() if n < least)
    if short:
        raise ValueError(
            f"every domain should have at least {least} transitions, as many as an observation "
            f"has frames, got {short}; record more of it, or leave it out of the dataset"
        )
    if config.batch_size % processes:
        raise ValueError(
            f"batch_size should be a multiple of the {processes} processes, got {config.batch_size}"
        )
    shares = len(config.domains or transitions) if config.batches == "mixed" else 1
    if config.batch_size < shares:
        raise ValueError(
            f"batch_size should be at least the number of domains, {shares}, with batches "
            f"mixed, got {config.batch_size}"
        )
    most = largest_batch(config, transitions)
    if config.batch_size > most:
        held = ", ".join(f"{domain} {n}" for domain, n in transitions.items())
        raise ValueError(
            f"batch_size should be at most {most}, as many as there are transitions for ({held}), "
            f"got {config.batch_size}; record more, or choose a smaller batch_size"
        )


def largest_batch(config: PretrainConfig, transitions: Mapping[str, int]) -> int:
    """Of the domains with so many transitions each.

    Rows are drawn one by one, with replacement: more of them than there are would repeat some in
    every batch, and prototypes would be shared out among copies.
    """
    if config.batches == "alternate":
        return min(transitions.values())
    turns = Turns(config, tuple(transitions))
    total = sum(turns.weights)
    return min(
        transitions[domain] * total // turns.weight_of(domain)
        for domain in dict.fromkeys(turns.names)
    )


def warn_of_left_out_namesakes(config: PretrainConfig, buffer: ReplayBuffer) -> None:
    """Of a domain that several datasets have, --domains may mean one, and may mean all."""
    for name in dict.fromkeys(map(name_of, config.domains)):
        namesakes = [d for d in sorted(buffer.domains) if name_of(d) == name]
        left_out = [d for d in namesakes if d not in config.domains]
        if left_out:
            _log.warning(
                "of %s, which several datasets have, %s is trained on and %s left out; for all of "
                "it name --domains %s",
                name,
                ", ".join(d for d in namesakes if d in config.domains),
                ", ".join(left_out),
                " ".join(namesakes),
            )
