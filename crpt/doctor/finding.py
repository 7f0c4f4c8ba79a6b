"""What the doctor says of one part of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "note", "error"]
    """note: crpt runs all the same; error: some of its commands do not."""
    what: str
