"""The compiled storage (csrc/replay)."""

from __future__ import annotations

try:
    from crpt._cpu import Ring, RingWriter
except ImportError as error:
    raise ImportError(
        f"crpt's compiled replay buffer could not be imported ({error}); build it with "
        "`pip install .` in a checkout of crpt"
    ) from error

__all__ = ["Ring", "RingWriter"]
