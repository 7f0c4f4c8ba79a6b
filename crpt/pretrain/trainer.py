"""Updates of pre-training: model, optimiser and sampler, and nothing about files."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crpt.byte_encoder import bytes_are_faster
from crpt.config import PretrainConfig
from crpt.distributed import ALONE, Team
from crpt.encoder import EncoderConfig, initial_encoder, on_device
from crpt.measures import effective_rank
from crpt.objectives import Losses, build
from crpt.pretrain.feeds import Domains, Feed, Part, ResidentFeed, ViewConfig, fits, whole
from crpt.pretrain.inputs import check_sizes, frame_geometry, precision_on
from crpt.pretrain.streamed_feed import StreamedFeed
from crpt.pretrain.turns import Turns
from crpt.pretrain.update_graph import CudaRecorder, Recorder, UpdateGraphs
from crpt.pretrain.watch import FiniteWatch
from crpt.replay import ReplayBuffer
from crpt.seeds import seeded

RANK_BATCH = 128

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Update:
    """What an update leaves; where it is replayed, in the same memory each time."""

    losses: Losses
    """Its numbers are views of `numbers`."""
    numbers: Tensor
    gradients: list[Tensor]


class Trainer:
    """One pre-training run, update by update.

    On a GPU the frames lie in its memory if they fit, updates are replayed as CUDA graphs unless
    there are several processes, and nothing waits for the device but what is asked of it: figures,
    ranks, states.
    """

    def __init__(
        self,
        config: PretrainConfig,
        buffer: ReplayBuffer,
        *,
        seed: int,
        device: torch.device,
        team: Team = ALONE,
        cuda_graphs: bool = True,
    ) -> None:
        self.team = team
        self.buffer = buffer
        self.device = device
        self.round = 0
        self.updates = 0
        self.turns = Turns(config, buffer.domains)
        self.domains = tuple(dict.fromkeys(self.turns.names))
        _check_names(self.domains, buffer)
        channels, image_size = frame_geometry(buffer, self.domains)
        check_sizes(config, buffer, self.domains, team)
        encoder = initial_encoder(
            EncoderConfig(
                in_channels=channels * config.frame_stack,
                image_size=image_size,
                projection_dim=config.projection_dim,
                embedding_norm=config.embedding_norm,
            ),
            seed,
        )
        self.config = config = replace(config, precision=precision_on(config, encoder, device))
        with seeded(seed + 1):
            model = build(encoder, config)
        self.model = on_device(model, device)
        self.model.join(team)
        self.forward: Callable[[Tensor, Tensor], Losses] = self.model
        if team.group is not None:
            self.forward = DistributedDataParallel(self.model, process_group=team.group)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        cuda = device.type == "cuda"
        # A graph reads a rate that changes from the device.
        scheduled = cuda and config.schedule != "constant"
        rate = torch.tensor(config.learning_rate, device=device) if scheduled else None
        self._rate: float | Tensor = config.learning_rate if rate is None else rate
        self.optimizer = torch.optim.Adam(self.trained, lr=self._rate, fused=True, capturable=cuda)
        self.generator = torch.Generator().manual_seed(seed)
        self.watch = FiniteWatch(device)
        self.feed: Feed | None = self._feed() if cuda else None
        self.passed: Callable[[str], None] = lambda phase: None
        """Is told of every phase of an update when it is over, or recorded."""
        self._gradients: list[Tensor] = []
        self._averaging = self._averaging_by_domain() if self.turns.mixed else None
        self._graphs: UpdateGraphs[Domains, _Update] | None = None
        if cuda and cuda_graphs and team.group is None:
            self.replay_updates(CudaRecorder(device))

    def replay_updates(self, recorder: Recorder) -> None:
        """From now on updates are recorded and replayed."""
        self._graphs = UpdateGraphs(recorder, self._update)

    def _feed(self) -> Feed:
        views = self._views()
        if fits(self.buffer, self.domains, self.device):
            return ResidentFeed(self.buffer, self.domains, views, self.device, self.generator)
        return StreamedFeed(
            self.buffer, self.batches(), views, self.device, self.generator,
            upcoming=None if self.turns.in_order else lambda: self.turns.after(self.updates),
        )  # fmt: skip

    def _views(self) -> ViewConfig:
        c = self.config
        dtype = torch.bfloat16 if c.precision == "bf16" else self.trained[0].dtype
        if c.precision == "bf16" and bytes_are_faster(self.model.online, self.device):
            dtype = torch.uint8
        mine = self.team.share(c.batch_size)
        shares = self.turns.shares
        return ViewConfig(c.batch_size, c.frame_stack, c.shift_pad, dtype, mine, shares)

    def _averaging_by_domain(self) -> Tensor:
        """[domains, rows of this process]: times what those rows have, its part of the means over
        each domain's rows of a mixed batch."""
        views = self._views()
        weights = torch.zeros(len(self.domains), self.config.batch_size, dtype=torch.float64)
        for part in views.parts(self.turns.names):
            weights[self.domains.index(part.domain), part.begin : part.end] = 1
        weights /= weights.sum(dim=1, keepdim=True)
        return weights[:, views.rows].to(self.device, self.trained[0].dtype)

    def batches(self) -> list[Domains]:
        """The domains of each update of this round; one that the config names twice has two turns,
        or two shares."""
        return self.turns.of_round(self.round)

    def parts(self, domains: Domains) -> list[Part]:
        """The rows of each in a batch of them."""
        return self._views().parts(domains)

    def rows_of(self, domain: str) -> int:
        """Of the domain in one of its batches."""
        if not self.turns.mixed:
            return self.config.batch_size
        return sum(p.end - p.begin for p in self.parts(self.turns.names) if p.domain == domain)

    def sample(self, domains: Domains) -> tuple[Tensor, Tensor]:
        """obs and next_obs, shifted, [B, K*C, H, W], bytes or floats in [0, 1], shares of the
        domains; of a team, this process's rows of them."""
        if self.feed is not None:
            self.feed.draw(domains)
            return self.feed.views(domains)
        return self._sample(domains, self.generator)

    def _sample(self, domains: Domains, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        c, views = self.config, self._views()
        batches = [
            self.buffer.sample(
                part.domain,
                part.end - part.begin,
                frame_stack=c.frame_stack,
                pad=c.shift_pad,
                dtype=views.dtype,
                device=self.device,
                generator=generator,
                rows=part.of(views.rows),
            )
            for part in views.parts(domains)
        ]
        return whole([b.obs for b in batches]), whole([b.next_obs for b in batches])

    def update(self, domains: Domains) -> Losses:
        """One update on a batch of these domains. The numbers among its losses stay; the rest of
        them, on a GPU, until that batch of the next round."""
        self._set_rate()
        self.updates += 1
        if self._graphs is None:
            return self.step(*self.sample(domains))
        if self.feed is not None:
            self.feed.draw(domains)
        with _fastest_convolutions():
            done = self._graphs(domains)
        self._gradients = done.gradients
        return _lasting(done, whole=self.turns.repeat)  # within a round, it has to last

    def _set_rate(self) -> None:
        """The learning rate of this update, (1 + cos(pi t / T)) / 2 of the first with a cosine."""
        if self.config.schedule == "constant":
            return
        done = self.updates / (self.config.rounds * self.turns.per_round)
        rate = self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        if isinstance(self._rate, Tensor):
            self._rate.fill_(rate)
        else:
            self.optimizer.param_groups[0]["lr"] = rate

    def _update(self, domains: Domains) -> _Update:
        """The part of an update that can be recorded."""
        views = self.sample(domains) if self.feed is None else self.feed.views(domains)
        self.passed("sample")
        losses = self.step(*views)
        numbers = torch.stack([losses.total.detach(), losses.distance, *losses.parts.values()])
        if losses.by_domain is not None:
            numbers = torch.cat([numbers, losses.by_domain.flatten()])
        return _Update(_with_numbers(losses, numbers), numbers, self._gradients)

    def step(self, obs: Tensor, next_obs: Tensor) -> Losses:
        """The update on these views."""
        self.model.before_update()
        losses = self.forward(obs, next_obs)
        self.passed("forward")
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.passed("backward")
        self.optimizer.step()
        self.model.after_update()
        self.watch.observe(losses.total)
        self._gradients = [p.grad for p in self.trained if p.grad is not None]
        losses = self._averaged(losses)
        self.passed("finish")
        return losses

    @torch.no_grad()
    def _averaged(self, losses: Losses) -> Losses:
        """With the means of each domain's rows, those of all processes, in place of the rows."""
        if self._averaging is None or losses.rows is None:
            return losses
        by_domain = self.team.mean(self._averaging @ losses.rows) * self.team.size
        return replace(losses, rows=None, by_domain=by_domain)

    @torch.no_grad()
    def measure(self, domain: str) -> Losses:
        """The losses of a batch of the domain that training does not miss; they leave no trace."""
        views = self._sample((domain,), torch.Generator().manual_seed(self.round))
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.before_update()
        losses: Losses = self.model(*views)
        self.model.load_state_dict(before)
        return losses

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Length of the last update's gradient."""
        return float(torch.nn.utils.get_total_norm(self._gradients))

    @torch.no_grad()
    def ranks(self, domain: str) -> dict[str, float]:
        """Effective rank of h and of the z that would be exported now, of a batch that training
        does not miss."""
        obs = self.buffer.sample(
            domain, max(min(self.config.batch_size, RANK_BATCH), 2),
            frame_stack=self.config.frame_stack, pad=0,
            generator=torch.Generator().manual_seed(self.round),
        ).obs.to(self.device)  # fmt: skip
        encoder = self.model.online.eval()
        h = encoder(obs)
        z = encoder.embed_features(h)
        encoder.train()
        return {
            "effective_rank_h": effective_rank(h),
            "effective_rank_exported": effective_rank(z),
        }

    def is_finite(self) -> bool:
        """Whether every weight, running statistic and moment of Adam is a finite number."""
        moments = [m for state in self.optimizer.state.values() for m in state.values()]
        tensors = [*self.model.state_dict().values(), *moments]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def state(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "precision": self.config.precision,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.round = state["round"]
        before = state.get("precision", self.config.precision)
        if before != self.config.precision:
            _log.warning(
                "this run was pre-trained in %s until round %d and goes on in %s, what `precision: "
                "auto` takes here: its figures are not those of a run that stayed",
                before, self.round, self.config.precision,
            )  # fmt: skip
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.updates = self.round * self.turns.per_round
        # Of what was saved on a CPU, not true of this optimiser here.
        for group in self.optimizer.param_groups:
            group["capturable"] = self.device.type == "cuda"
            group["lr"] = self._rate
        self.watch.restart(self.updates)
        if self._graphs is not None:
            self._graphs.forget()  # the optimiser's state lies elsewhere now


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """cuDNN times its algorithms once for each shape, and takes the best."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _with_numbers(losses: Losses, numbers: Tensor) -> Losses:
    """numbers: total, distance, parts, and by_domain, if there is one."""
    end = 2 + len(losses.parts)
    total, distance, *parts = numbers[:end]
    by_domain = losses.by_domain
    return replace(
        losses, total=total, distance=distance,
        parts=dict(zip(losses.parts, parts, strict=True)),
        by_domain=None if by_domain is None else numbers[end:].view_as(by_domain),
    )  # fmt: skip


def _lasting(update: _Update, whole: bool) -> Losses:
    """Losses whose numbers the next replay does not write over; nor, if `whole`, the rest."""
    losses = _with_numbers(update.losses, update.numbers.clone())
    return losses.of_rows(torch.clone) if whole else losses


def _check_names(domains: tuple[str, ...], buffer: ReplayBuffer) -> None:
    unknown = [domain for domain in domains if domain not in buffer.domains]
    if unknown:
        raise ValueError(
            f"domains should be some of the dataset's, {', '.join(sorted(buffer.domains))}, got "
            f"{', '.join(unknown)}"
        )
