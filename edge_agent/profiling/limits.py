"""Memory limits that are exact: a control group (version 2) of systemd, for one program and all its processes.

Nothing else will do: limits of a process (RLIMIT_AS, RLIMIT_DATA) count addresses that were asked for, not memory that is held.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
PROBE_S = 20
# The limit that is in force, said on a descriptor that must have come through.
PROBE = 'cat "/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/memory.max" >/dev/fd/{descriptor}'


@dataclass(frozen=True)
class Limit:
    mb: int | None  # None: as much as there is
    command: tuple[str, ...] = ()  # becomes the program that is limited
    problem: str = ""  # why it cannot be had here

    def peak_mb(self, pid: int) -> float | None:
        """Peak of the control group of `pid`, where the group is of that program alone."""
        if not self.command:
            return None
        try:
            (line,) = (one for one in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if one.startswith("0::/"))
            return round(int((GROUPS / line.removeprefix("0::/") / "memory.peak").read_text()) / 1e6, 1)
        except (OSError, ValueError):
            return None


NO_LIMIT = Limit(None)


def limited(mb: int) -> Limit:
    """A limit of `mb` MB without swap, in force when tried; otherwise with the `problem`."""
    if not (GROUPS / "cgroup.controllers").exists():
        return Limit(mb, problem="this system has no control groups of version 2")
    if shutil.which("systemd-run") is None:
        return Limit(mb, problem="there is no systemd-run here; in a container, limit the container instead")
    size = mb * 10**6 // 4096 * 4096
    options = ("--scope", "--quiet", "--collect", f"--property=MemoryMax={size}", "--property=MemorySwapMax=0", "--")
    problem = ""
    for manager in (("systemd-run",), ("systemd-run", "--user")) if os.geteuid() == 0 else (("systemd-run", "--user"),):
        problem = _problem((*manager, *options), size)
        if not problem:
            return Limit(mb, (*manager, *options))
    return Limit(mb, problem=problem)


def _problem(command: tuple[str, ...], size: int) -> str:
    """Why a program within `command` has no limit of `size` bytes; empty when it has."""
    ours, theirs = os.pipe()
    try:
        with open(ours, "rb") as said:
            try:
                done = subprocess.run(
                    [*command, "sh", "-c", PROBE.format(descriptor=theirs)],
                    pass_fds=[theirs],
                    capture_output=True,
                    text=True,
                    timeout=PROBE_S,
                )
            finally:
                os.close(theirs)
            in_force = said.read().strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"systemd-run did not work: {error}"
    if in_force == str(size).encode():
        return ""
    said_last = (done.stderr.strip().splitlines() or ["the limit is not in force"])[-1]
    return f"systemd-run gives no memory limit here: {said_last}"
