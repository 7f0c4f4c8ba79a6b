"""`python -m crpt.doctor`."""

from __future__ import annotations

import sys

import tyro

try:
    from crpt import cli
    from crpt.doctor.examination import findings
except ImportError as problem:  # without compiled kernels there is nothing else to look at
    sys.exit(f"error {problem}")


def doctor() -> int:
    """What of this machine crpt can use, and what keeps it from the rest.

    The exit code is 1 where something that its commands need does not work.
    """
    healthy = True
    for finding in findings():
        print(f"{finding.level:5} {finding.what}", flush=True)
        healthy = healthy and finding.level != "error"
    return 0 if healthy else 1


if __name__ == "__main__":
    with cli.without_traceback("Nothing was changed."):
        sys.exit(tyro.cli(doctor, prog="python -m crpt.doctor"))
