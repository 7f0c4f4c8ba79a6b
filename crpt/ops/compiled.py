"""The compiled CPU kernels, or an error that says how to build them."""

from __future__ import annotations

try:
    import crpt._cpu as _cpu
except ImportError as error:
    raise ImportError(
        f"crpt's compiled operators could not be imported ({error}); build them with "
        "`pip install .` in a checkout of crpt"
    ) from error

__all__ = ["_cpu"]
