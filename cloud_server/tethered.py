"""Run a program that must not outlive us: ``python -m lwfed.cloud_server.tethered PID PROGRAM ARGUMENT...``

The kernel sends it SIGTERM when its parent ends, in whatever way; the setting survives exec, and so does how many files it may
open, which is as many as the system lets it, within reason. Doing so between fork and exec of the parent itself would not be
safe in a process with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from lwfed import descriptors

_PR_SET_PDEATHSIG = 1  # prctl(2)


def command(program: Sequence[str]) -> list[str]:
    """The command line that runs `program` tethered to this process."""
    return [sys.executable, "-m", "lwfed.cloud_server.tethered", str(os.getpid()), *program]


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the tether was tied
        sys.exit(0)
    descriptors.raise_limit()
    os.execvp(program[0], program)  # noqa: S606 - our own program and arguments


if __name__ == "__main__":
    main()
