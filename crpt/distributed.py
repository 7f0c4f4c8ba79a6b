"""Several processes that train one model, each on its share of every batch (`torchrun -m
crpt.pretrain`)."""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from crpt.interrupt import Interrupted

TIMEOUT = timedelta(minutes=10)


class TeamError(RuntimeError):
    """Another process of the team has ended, or cannot be reached."""


class BackendError(RuntimeError):
    """What the processes reach each other by does not work here; none is known to be lost."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, as one of them sees them; the default is a process on its own."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """For tensors, on the device of training."""
    control: dist.ProcessGroup | None = None
    """For what the processes agree on, on the CPU: asking it never waits for a GPU."""

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes files and speaks to the user."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's part of n rows; parts differ by one at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        if self.control is None:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.control)
        return bool(flags.item())

    def lead(self, work: Callable[[], None]) -> None:
        """Let the process that leads do this; the others wait, and raise what it raises."""
        own: Exception | None = None
        if self.leads:
            try:
                work()
            except Exception as error:
                own = error
        told = [None if own is None else _sendable(own)]
        if self.control is not None:
            dist.broadcast_object_list(told, group=self.control)
        failed = own or told[0]
        if failed is not None:
            raise failed

    def require_same(self, values: Mapping[str, object], remedy: str) -> None:
        """ValueError in every process unless each of the named values is the same in all."""
        if self.control is None:
            return
        everyones: list[Mapping[str, object]] = [{}] * self.size
        dist.all_gather_object(everyones, values, self.control)
        for rank, theirs in enumerate(everyones):
            differing = [
                f"{name} should be the same for all processes, got {first!r} in process 0 and "
                f"{other!r} in process {rank}"
                for name in {**everyones[0], **theirs}
                if (first := everyones[0].get(name)) != (other := theirs.get(name))
            ]
            if differing:
                raise ValueError("; ".join([*differing, remedy]))

    @torch.no_grad()
    def mean(self, x: Tensor) -> Tensor:
        """The mean over processes, without gradient."""
        if self.group is None:
            return x.detach()
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total / self.size

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        """The rows of all processes, [B, ...] each, in the order of their ranks, without
        gradient. B is the same everywhere."""
        if self.group is None:
            return x.detach()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.detach().contiguous(), group=self.group)
        return torch.cat(parts)


def _sendable(error: Exception) -> Exception:
    """The error, or what it says where it cannot be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


ALONE = Team()


def launched_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def leads() -> bool:
    """`Team.leads`, before the team has met."""
    return not launched_by_torchrun() or os.environ["RANK"] == "0"


def own_device(device: torch.device) -> torch.device:
    """Of the GPUs of this host, the one for this process, where no number was asked for."""
    if device.type != "cuda" or device.index is not None or not launched_by_torchrun():
        return device
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    processes = max(number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if 0 < gpus < processes:
        raise ValueError(
            f"--nproc-per-node of torchrun should be at most {gpus}, the number of GPUs that torch "
            f"finds on this host, got {processes} processes"
        )
    return torch.device("cuda", number)


@contextmanager
def join(device: torch.device) -> Iterator[Team]:
    """The team that torchrun started this process in; on its own, where it was started alone."""
    if not launched_by_torchrun():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with lost_processes_named(lambda: "What was saved is kept: start the same command again"):
        dist.init_process_group(backend, timeout=TIMEOUT)
        # NCCL would wait here for collectives with who is gone, and nobody hear of the error. torch
        # aborts them at the end of the process, when the user has been told.
        destroys = backend == "gloo"
        try:
            control = dist.new_group(backend="gloo", timeout=TIMEOUT)
            yield Team(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, control)
            destroys = True
        except Interrupted:  # all of them are, at the same step
            destroys = True
            raise
        finally:
            if destroys:
                dist.destroy_process_group()


@contextmanager
def lost_processes_named(kept: Callable[[], str]) -> Iterator[None]:
    """TeamError where processes fail to reach each other, BackendError where they cannot for
    another reason; `kept` says what the user still has."""
    try:
        yield
    except (TeamError, BackendError):
        raise
    except RuntimeError as error:
        # gloo has no error type of its own, but names its source file.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        _outlive_the_agent()
        message = str(error).partition("Exception raised from")[0]  # frames of C++ follow
        if not _LOST.search(message):
            raise BackendError(
                f"the backend of torch.distributed has failed: {_in_short(message)}. Mend that "
                f"first. {kept()}"
            ) from error
        raise TeamError(
            f"{_lost_process(message)} has ended or cannot be reached; what it said itself, if "
            f"anything, tells why. {kept()}"
        ) from error


_LOST = re.compile(
    r"remote process exit|closed the connection|connection (was likely )?(closed|reset|refused)|"
    r"broken pipe|failed to connect|no route to host|unreachable|"
    r"host is down|connection abort|communicator was aborted|tim(ed|ing) out|"
    r"(application|barrier|connect|operation|read|socket|wait|write) timeout",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store say when another process is gone or does not answer."""


def _in_short(message: str) -> str:
    """Its first line; of NCCL's, which tells the kind of error, with the reason."""
    first = message.strip().partition("\n")[0]
    reason = re.search(r"Last error:\n(.+)", message)
    return (f"{first}: {reason[1]}" if reason else first).rstrip(". ")


def _outlive_the_agent() -> None:
    """Ignores SIGTERM under torchrun, whose agent sends it to all as soon as one is lost: this
    process ends by itself, once it has told what it knows."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if under_torchrun and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _lost_process(message: str) -> str:
    """Its number where only one can be meant, and its address where the message has it."""
    two = os.environ.get("WORLD_SIZE") == "2" and "RANK" in os.environ
    name = f"process {1 - int(os.environ['RANK'])}" if two else "a process"
    address = re.search(r"\[([\w.:]+)\]:\d+", message)
    return f"{name} of the team" + (f" ({address[1]})" if address else "")
