"""The way to a kernel past torch's dispatcher, for calls in which that has nothing to decide.

Written in Python, an operator costs 15 us and more on its way through the dispatcher, several times
that where the code has left the caches: as long as some of them compute. Nearly all calls are of
plain tensors on one device with no mode of torch's active, for which the dispatcher would go to
autograd and then to the kernel; these go there at once. All others (subclasses, fake, batched, conj
and neg views, inference mode, autocast, functorch, compiling, tracing, profiling, any mode) take
the dispatcher's way, and so see the operators as they always did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from crpt.ops.schemas import LIBRARY

_C: Any = torch._C
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
_KERNELS: dict[str, dict[str, Callable[..., Any]]] = {device: {} for device in _DEVICES}


def kernel(name: str, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what computes the operator on tensors of that device, cpu or cuda."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.impl(name, function, _DEVICES[device])
        _KERNELS[device][name] = function
        return function

    return register


def kernel_for(name: str, args: Sequence[object]) -> Callable[..., Any] | None:
    """The kernel that the dispatcher would call below autograd; None where it may do otherwise.

    Not to be asked while torch.compile traces.
    """
    if not _PLAIN_TENSORS or _function_modes() or _profiling() or _thread_keys() != _PLAIN_THREAD:
        return None
    kernels = None
    for x in args:
        if isinstance(x, Tensor):
            if type(x) is not Tensor and type(x) is not Parameter:
                return None
            own = _PLAIN_TENSORS.get(_C._dispatch_keys(x).raw_repr())
            if own is None or (kernels is not None and own is not kernels):
                return None
            kernels = own
    return None if kernels is None else kernels.get(name)


def _thread_keys() -> tuple[int, int]:
    """What the modes that are active in this thread add to the keys of every tensor and take away:
    modes of Python, functorch and the tracer, autocast and inference mode."""
    return (
        _C._dispatch_tls_local_include_set().raw_repr(),
        _C._dispatch_tls_local_exclude_set().raw_repr(),
    )


def _in_a_new_thread(function: Callable[[], Any]) -> Any:
    """What it returns where no mode is active, whatever is where this is imported."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _plain_keys(device: str) -> int:
    """Those of a tensor on that device that is nothing but a tensor."""
    keys = _C.DispatchKeySet(_C._dispatch_key_parse(device))
    for name in (f"Autograd{device}", f"Autocast{device}", "ADInplaceOrView"):
        keys = keys.add(_C._dispatch_key_parse(name))
    return int(keys.raw_repr())


try:
    _PLAIN_THREAD: tuple[int, int] = _in_a_new_thread(_thread_keys)
    _function_modes = _C._len_torch_function_stack
    _profiling = _C._autograd._profiler_enabled
    _PLAIN_TENSORS = {_plain_keys(key): _KERNELS[device] for device, key in _DEVICES.items()}
except (AttributeError, RuntimeError):  # a torch that tells these otherwise: the dispatcher decides
    _PLAIN_TENSORS = {}
