"""Drawing batches: what a buffer and its copy on a GPU have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from crpt.replay.gather import Rows
from crpt.replay.spec import DomainSpec

if TYPE_CHECKING:  # a process that only writes does not wait for torch
    import torch

    from crpt.replay.batch import Batch, Views
    from crpt.replay.prefetch import Batches

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15


class Samples(ABC):
    """Something that holds domains to draw transitions from."""

    @property
    @abstractmethod
    def domains(self) -> tuple[str, ...]: ...

    @abstractmethod
    def spec(self, domain: str) -> DomainSpec: ...

    @abstractmethod
    def _fill(self, batch: Batch, rows: Rows, views: Views, threads: int) -> None:
        """Writes these rows into the batch."""

    @property
    def _own_device(self) -> torch.device | None:
        """Where batches come to be; none: on the CPU, and they are sent from there."""
        return None

    def sample(
        self,
        domain: str | Mapping[str, float],
        batch_size: int,
        *,
        n_step: int = 1,
        gamma: float | None = None,
        frame_stack: int = 3,
        pad: int = 4,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        out: Batch | None = None,
        rows: slice | None = None,
    ) -> Batch:
        r"""Transitions drawn uniformly with replacement, obs and next_obs each under its own shift.

        .. math::
            reward = \sum_{i=1}^n \Big(\prod_{j<i} \gamma d_j\Big) r_i, \qquad
            discount = \prod_{i=1}^n \gamma d_i

        over the n steps from obs to next_obs, all of one episode; action is that of the first.
        The batch is a function of what is stored and of one number drawn from the generator,
        whatever the number of threads.

        Args:
            domain: the ring to draw from; or a mixture, weights by domain: each domain's share of
                the rows is its weight's share on average, and within one row of that every time.
            batch_size: B, at least 1.
            n_step: n, steps of a transition. Those with fewer left in the episode are not drawn.
            gamma: in [0, 1]; needed for n > 1, otherwise 1 if none.
            frame_stack: K, frames in an observation; an episode's first is repeated.
            pad: largest shift in pixels; 0: none.
            dtype: of obs and next_obs; none: uint8. Floating types are scaled to [0, 1].
            device: where the batch goes; none: where out is, otherwise the CPU.
            generator: on the CPU; none: torch's default one.
            out: a batch of `empty`, or an earlier one, to write into and return.
            rows: [start, stop) of the batch, that alone are made and returned: what is drawn for a
                row is the same, whoever makes the others. None: all.

        Raises:
            ValueError: there is nothing to draw, or an argument is not as above.
            OverwrittenError: writers overwrite the steps faster than they can be read.
        """
        from crpt.replay.batch import Views

        views = Views.of(frame_stack, pad, dtype, n_step, gamma)
        wanted = _range_of(rows, batch_size)
        seed = draw_seed(generator)
        return self._sample(domain, batch_size, views, seed, device, out, rows=wanted)

    def empty(
        self,
        domain: str | Mapping[str, float],
        batch_size: int,
        *,
        frame_stack: int = 3,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        pin_memory: bool = False,
    ) -> Batch:
        """A batch for `out` of `sample`, its values undefined."""
        import torch

        from crpt.replay.batch import Views, empty_batch

        views = Views.of(frame_stack, 0, dtype, 1, None)
        return empty_batch(
            self._specs(domain), batch_size, views, device=torch.device(device),
            pin_memory=pin_memory,
        )  # fmt: skip

    def batches(
        self,
        domain: str | Mapping[str, float],
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        stop: int | None = None,
        prefetch: int = 2,
        n_step: int = 1,
        gamma: float | None = None,
        frame_stack: int = 3,
        pad: int = 4,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Batches:
        """The batches of steps start, start + 1, ..., stop - 1, drawn ahead by a thread.

        The batch of a step is a function of what is stored when it is drawn, of the seed and of the
        step. Close the iterator, or use it in a `with`, when it is not used to its end.

        Args:
            seed, start: integers of at least 0.
            stop: none: never.
            prefetch: batches drawn ahead, at least 1.
            domain, batch_size, n_step, gamma, frame_stack, pad, dtype, device: as of `sample`. What
                goes to a GPU passes through pinned memory, on a stream of its own.
        """
        import torch

        from crpt.replay.batch import Views
        from crpt.replay.prefetch import Batches, step_seed

        views = Views.of(frame_stack, pad, dtype, n_step, gamma)
        self._specs(domain)  # its errors come now, not from the thread
        require_at_least("batch_size", batch_size, 1)
        require_at_least("seed", seed, 0)
        require_at_least("start", start, 0)
        require_at_least("prefetch", prefetch, 1)
        target = None if device is None else torch.device(device)
        threads = num_threads()  # a new thread would ask OpenMP, and get another answer

        def draw(step: int) -> Batch:
            of_step = step_seed(seed, step)
            return self._sample(domain, batch_size, views, of_step, target, threads=threads)

        return Batches(draw, start=start, stop=stop, prefetch=prefetch, device=target)

    def _sample(
        self,
        domain: str | Mapping[str, float],
        batch_size: int,
        views: Views,
        seed: int,
        device: torch.device | str | None = None,
        out: Batch | None = None,
        threads: int | None = None,
        rows: range | None = None,
    ) -> Batch:
        from crpt.replay.batch import shares

        require_at_least("batch_size", batch_size, 1)
        wanted = range(batch_size) if rows is None else rows
        specs = self._specs(domain)
        batch, result = self._where_to(specs, len(wanted), views, device, out)
        weights = dict.fromkeys(specs, 1.0) if isinstance(domain, str) else domain
        counts = shares(weights, batch_size, (seed * _GOLDEN % _WORD) / _WORD)
        begin = 0
        for i, (name, count) in enumerate(zip(specs, counts, strict=True)):
            first, last = max(begin, wanted.start), min(begin + count, wanted.stop)
            if first < last:
                place = slice(first - wanted.start, last - wanted.start)
                batch.domain[place] = i
                own = Rows(
                    name, place.start, place.stop, (seed + i * _GOLDEN) % _WORD, first=first - begin
                )
                self._fill(batch, own, views, threads or num_threads())
            begin += count
        return send(batch, result)

    def _where_to(
        self,
        specs: Mapping[str, DomainSpec],
        batch_size: int,
        views: Views,
        device: torch.device | str | None,
        out: Batch | None,
    ) -> tuple[Batch, Batch | torch.device]:
        """The batch to fill, and that or the device which it is then sent to."""
        import torch

        from crpt.replay.batch import check_out, empty_batch, exact_device

        own = exact_device(self._own_device or "cpu")
        target = exact_device(device or own)
        if out is not None:
            check_out(out, empty_batch(specs, batch_size, views, device=torch.device("meta")))
            there = exact_device(out.obs.device)
            if device is not None and target != there:
                raise ValueError(f"device should be that of out, {there}, got {device}")
            target = there
        if target == own:
            batch = out or empty_batch(specs, batch_size, views, device=own)
            return batch, batch
        pinned = own.type == "cpu" and target.type == "cuda"
        batch = empty_batch(specs, batch_size, views, device=own, pin_memory=pinned)
        return batch, out or target

    def _specs(self, domain: str | Mapping[str, float]) -> dict[str, DomainSpec]:
        if isinstance(domain, str):
            return {domain: self.spec(domain)}
        if not isinstance(domain, Mapping):
            raise TypeError(
                f"domain should be a name or weights by name, got {type(domain).__name__}"
            )
        if not domain:
            raise ValueError("domain should name at least one domain, got none")
        for name, weight in domain.items():
            if not (isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of {name} should be positive, got {weight}")
        return {name: self.spec(name) for name in domain}


def send(batch: Batch, to: Batch | torch.device) -> Batch:
    from crpt.replay.batch import Batch

    if to is batch:
        return batch
    if isinstance(to, Batch):
        for (_, tensor), (_, target) in zip(batch.tensors(), to.tensors(), strict=True):
            target.copy_(tensor, non_blocking=target.device.type == "cuda")
        return to
    # What comes from a GPU is to be there when it is returned.
    async_ = to.type == "cuda"
    sent: dict[str, Any] = {
        name: tensor.to(to, non_blocking=async_) for name, tensor in batch.tensors()
    }
    return Batch(**sent, domains=batch.domains, widths=batch.widths)


def _range_of(rows: slice | None, batch_size: int) -> range | None:
    if rows is None:
        return None
    if not isinstance(rows, slice):
        raise TypeError(f"rows should be a slice, got {type(rows).__name__}")
    start, stop = rows.start, rows.stop
    known = type(start) is int and type(stop) is int and rows.step in (None, 1)
    if not (known and 0 <= start <= stop <= batch_size):
        raise ValueError(
            f"rows should be slice(start, stop) with 0 <= start <= stop <= {batch_size}, got {rows}"
        )
    return range(start, stop)


def draw_seed(generator: torch.Generator | None) -> int:
    """The one number that a call takes from the generator."""
    import torch

    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator should be on the cpu, got {generator.device}")
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator))


def num_threads() -> int:
    import torch

    return torch.get_num_threads()


def require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} should be at least {least}, got {value}")
