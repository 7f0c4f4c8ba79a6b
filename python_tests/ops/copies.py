"""What torch copies while an operator runs: its kernels' reads are no copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# clone, contiguous and to end in copy_; cat and index_select copy by themselves.
_COPIES = {"aten::clone", "aten::copy_", "aten::cat", "aten::index", "aten::index_select"}


def copies(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """The names of torch's copying operators that the call runs, within operators too.

    Under the profiler a call takes the dispatcher's way to the function that a plain call reaches
    directly (crpt.ops.direct): what that does is the same.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args, **kwargs)
    names = [event.name for event in profile.events()]
    assert names  # the results' memory at least
    return [name for name in names if name in _COPIES]
