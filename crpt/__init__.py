"""crpt: one visual encoder for many control domains, pre-trained on reward-free random play.

`crpt.Encoder` is the frozen encoder; `crpt.ops` the operators; `python -m crpt.train` the pipeline.
"""

from __future__ import annotations

import importlib
import os
import sys
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# In a checkout `python -m` finds these sources first, and the compiled modules are elsewhere: in
# the installed package.
__path__ = extend_path(__path__, __name__)

_is_command = sys.argv[:1] == ["-m"] and any(word.startswith("crpt.") for word in sys.orig_argv)
if _is_command and "OMP_WAIT_POLICY" not in os.environ:
    # Python is looking for one of our commands to run. OpenMP threads that spin for long while they
    # wait for each other make a busy machine tens of times slower; so short a spin costs an idle
    # one nothing. A wait policy of the user's own decides instead.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from crpt.encoder import Encoder

__all__ = ["Encoder", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Processes that only play need neither torch nor the encoder.
    if name == "Encoder":
        from crpt.encoder import Encoder

        return Encoder
    if name in ("envs", "ops", "replay"):
        return importlib.import_module(f"crpt.{name}")
    raise AttributeError(f"module 'crpt' has no attribute {name!r}")
