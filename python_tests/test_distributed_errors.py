"""Which GPU a process takes, and what it says of lost processes and of a backend that fails."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from crpt.distributed import (
    BackendError,
    TeamError,
    join,
    lost_processes_named,
    own_device,
)
from crpt.interrupt import Interrupted


def launch(monkeypatch, **environment):
    """What torchrun tells a process that it starts."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


def test_each_process_takes_the_gpu_of_its_number_unless_one_was_named(monkeypatch):
    launch(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert own_device(torch.device("cuda:3")) == torch.device("cuda:3")
    assert own_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("told", [{"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 3}, {"LOCAL_RANK": 2}])
def test_processes_without_a_gpu_each_are_told_how_many_there_are(monkeypatch, told):
    launch(monkeypatch, RANK=6, WORLD_SIZE=8, **told)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"should be at most 2, .* GPUs .*, got 3 processes"):
        own_device(torch.device("cuda"))
    assert own_device(torch.device("cuda:0")) == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # then this is not what is wrong
    own_device(torch.device("cuda"))


NCCL = "NCCL error in: NCCLUtils.hpp:268, {}, NCCL version 2.21.5\nnccl{}.\nLast error:\n{}"
PAIR = "[/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError(
            NCCL.format(
                "remote process exited or there was a network error",
                "RemoteError: A call failed possibly due to a network error",
                "socketProgressOpt: Call to recv from 10.0.0.2<33759> failed",
            )
        ),
        dist.DistBackendError(
            NCCL.format(
                "internal error",
                "InternalError: Internal check failed",
                "Net : Connection closed by remote peer two<50260>",
            )
        ),
        dist.DistBackendError(
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType="
            "ALLREDUCE, Timeout(ms)=600000) ran for 600010 milliseconds before timing out."
        ),
        dist.DistNetworkError(
            "The client socket has failed to connect to any network address of (two, 29500)."
        ),
        dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
        dist.DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined."),
        RuntimeError(PAIR + "Connection closed by peer [10.0.0.2]:1044"),
        RuntimeError(PAIR + "Read error [10.0.0.2]:1044: Connection reset by peer"),
        RuntimeError(PAIR + "Application timeout caused pair closure"),
        RuntimeError(PAIR + "Connect timeout [10.0.0.2]:1044"),
        RuntimeError(PAIR + "Write error [10.0.0.2]:1044: Host is down"),
        dist.DistStoreError("barrier timeout after 600000ms, key: round_0"),
        dist.DistBackendError("NCCL communicator was aborted on rank 0."),
    ],
    ids=lambda error: str(error)[-30:],
)
def test_a_lost_process_is_named(monkeypatch, error):
    launch(monkeypatch)
    with (
        pytest.raises(
            TeamError, match=r"^a process of the team .*ended or cannot be .*\. It is kept$"
        ),
        lost_processes_named(lambda: "Not this"),
        lost_processes_named(lambda: "It is kept"),
    ):
        raise error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            dist.DistBackendError(
                NCCL.format("invalid usage", "InvalidUsage: This usually reflects", reason)
                + "\nException raised from create at NCCLUtils.hpp:268 (most recent call first):"
                "\nframe #0: c10d::wait timeout()"
            ),
            f"NCCL error in: NCCLUtils.hpp:268, invalid usage, NCCL version 2.21.5: {reason}",
        )
        for reason in (
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
            "Error while creating shared memory segment /dev/shm/nccl-7dSA (size 9637888)",
            "Mismatched NCCL version detected : rank 0 version 22105 rank 1 version 22203",
        )
    ]
    + [
        (error, str(error).rstrip("."))
        for error in (
            dist.DistNetworkError("The server socket has failed to listen, name: EADDRINUSE."),
            dist.DistBackendError("NCCL error in: NCCLUtils.hpp:268, internal error"),
            RuntimeError("[/gloo/transport/tcp/device.cc:84] Unable to find address for: eth9"),
        )
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)
def test_what_the_backend_cannot_do_is_told_in_its_own_words(monkeypatch, error, text):
    launch(monkeypatch)
    with (
        pytest.raises(BackendError) as told,
        lost_processes_named(lambda: "Not this"),
        lost_processes_named(lambda: "It is kept"),
    ):
        raise error
    assert str(told.value) == (
        f"the backend of torch.distributed has failed: {text}. Mend that first. It is kept"
    )
    assert told.value.__cause__ is error


def test_other_errors_are_their_own():
    with pytest.raises(RuntimeError, match=r"^timed out$"), lost_processes_named(str):
        raise RuntimeError("timed out")


# NCCL waits there for those who are gone.
@pytest.mark.parametrize(
    ("device", "error", "destroyed"),
    [
        ("cuda:0", None, True),
        ("cuda:0", Interrupted, True),
        ("cuda:0", TeamError, False),
        ("cuda:0", MemoryError, False),
        ("cuda:0", KeyboardInterrupt, False),
        ("cpu", None, True),
        ("cpu", TeamError, True),
    ],
)
def test_nccl_is_left_alone_after_an_error(monkeypatch, device, error, destroyed):
    launch(monkeypatch, RANK=0, WORLD_SIZE=2, LOCAL_RANK=0)
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    with pytest.raises(error) if error else nullcontext(), join(torch.device(device)):
        if error:
            raise error("in the middle")
    backend = "gloo" if device == "cpu" else "nccl"
    assert calls == [backend] + ["destroyed"] * destroyed
