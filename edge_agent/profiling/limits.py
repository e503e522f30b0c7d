"""Memory limits that are exact: a control group for one program and all its processes.

Where control groups of version 2 limit memory, systemd makes it; where those of version 1 do, it is made here, within that
of this process. Nothing else will do: limits of a process (RLIMIT_AS, RLIMIT_DATA) count addresses that were asked for, not
memory that is held.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lwfed.control_groups import (
    GROUPS,
    OWN,
    PROC,
    PROCESSES,
    VERSION_1,
    VERSION_2,
    Hierarchy,
    limit_without_swap,
    limiting,
    own_group,
)
from lwfed.edge_agent.profiling import scratch

PROBE_S = 20
END_S = 5  # until the kernel has let go of processes that were killed
FOLDER = "edge-agent-profile-"  # a group of ours
ENTER = f'echo $$ > "$0/{PROCESSES}" && exec "$@"'
# The limits that are in force, said on a descriptor that must have come through.
PROBE = """
import os, sys
from lwfed.control_groups import limits_in_force
os.write(int(sys.argv[1]), " ".join(map(str, limits_in_force())).encode())
"""
CONTAINER = "in a container, limit the container instead"
TURN_ON = "where the kernel has that off, as on a Raspberry Pi, `cgroup_enable=memory cgroup_memory=1` in cmdline.txt turns it on"


class NoGroup(Exception):
    """None can be made, with what to do; for who measures, not for the command line."""


@dataclass(frozen=True)
class Group:
    """Where a program runs."""

    command: tuple[str, ...] = ()  # becomes the program that is in it
    hierarchy: Hierarchy | None = None  # None: where this process is

    def peak_mb(self, pid: int) -> float | None:
        """Of the group of `pid`, where that is of its program alone."""
        if self.hierarchy is None:
            return None
        group = own_group(self.hierarchy, PROC / str(pid) / OWN.name)
        try:
            return round(int((group / self.hierarchy.peak).read_text()) / 1e6, 1) if group else None
        except (OSError, ValueError):
            return None


Grouping = Callable[[], AbstractContextManager[Group]]  # a new one, for a block; raises NoGroup


def by_its_command(group: Group) -> AbstractContextManager[Group]:
    """There is nothing else to be done for it."""
    return contextlib.nullcontext(group)


NOWHERE_ELSE = partial(by_its_command, Group())


@dataclass(frozen=True)
class Limit:
    mb: int | None  # None: as much as there is
    group: Grouping = NOWHERE_ELSE
    problem: str = ""  # why it cannot be had here


NO_LIMIT = Limit(None)


def limited(mb: int, own: Path = OWN, groups: Path = GROUPS) -> Limit:
    """A limit of `mb` MB without swap, in force when tried; otherwise with the `problem`."""
    page = os.sysconf("SC_PAGE_SIZE")
    size = mb * 10**6 // page * page
    hierarchy = limiting(own, groups)
    if hierarchy is None:
        return Limit(mb, problem=f"this system's control groups do not limit memory; {TURN_ON}; {CONTAINER}")
    if hierarchy is VERSION_1:
        return _of_ours(mb, size, own_group(VERSION_1, own, groups))
    return _of_systemd(mb, size)


def _of_systemd(mb: int, size: int) -> Limit:
    if shutil.which("systemd-run") is None:
        return Limit(mb, problem=f"there is no systemd-run here; {CONTAINER}")
    options = ("--scope", "--quiet", "--collect", f"--property=MemoryMax={size}", "--property=MemorySwapMax=0", "--")
    problem = ""
    for manager in (("systemd-run",), ("systemd-run", "--user")) if os.geteuid() == 0 else (("systemd-run", "--user"),):
        group = partial(by_its_command, Group((*manager, *options), VERSION_2))
        try:
            problem = _problem(group, size)
        except OSError as error:
            problem = f"it did not work: {error}"
        if not problem:
            return Limit(mb, group)
    return Limit(mb, problem=f"systemd-run gives no memory limit here: {problem}")


def _of_ours(mb: int, size: int, within: Path | None) -> Limit:
    if within is None:
        return Limit(mb, problem=f"the control group of this process is not to be seen here; {CONTAINER}")
    group = partial(_own_group, within, size)
    try:
        problem = _problem(group, size)
    except NoGroup as error:
        return Limit(mb, problem=str(error))
    except OSError as error:
        problem = f"it did not work: {error}"
    return Limit(mb, problem=f"a group in {within} gives no memory limit: {problem}") if problem else Limit(mb, group)


@contextlib.contextmanager
def _own_group(within: Path, size: int) -> Iterator[Group]:
    """One of ours for a block, at whose end nothing is left in it. Raises NoGroup."""
    for left in scratch.abandoned(within, FOLDER):
        with contextlib.suppress(OSError):  # its processes are just ending
            left.rmdir()
    with contextlib.ExitStack() as made:
        try:
            folder = scratch.make(within, FOLDER)
            made.callback(_end, folder)
            limit_without_swap(folder, size)
        except OSError as error:
            why = error.strerror or error
            raise NoGroup(f"no group can be made in {within}: {why}; run this as root, or {CONTAINER}") from None
        yield Group(("sh", "-c", ENTER, str(folder)), VERSION_1)


def _end(group: Path) -> None:
    """Take it away with the processes in it: a child may outlive its parent by a moment."""
    until = time.monotonic() + END_S
    while time.monotonic() < until:
        try:
            group.rmdir()
        except OSError:
            _kill(group)
            time.sleep(0.01)
        else:
            return


def _kill(group: Path) -> None:
    with contextlib.suppress(OSError):
        for pid in map(int, (group / PROCESSES).read_text().split()):
            os.kill(pid, signal.SIGKILL)


def _problem(grouping: Grouping, size: int) -> str:
    """Why `size` bytes are not the limit of a program in such a group; empty when they are. Raises NoGroup and OSError."""
    with grouping() as group:
        ours, theirs = os.pipe()
        with open(ours, "rb") as said:
            try:
                done = subprocess.run(
                    [*group.command, sys.executable, "-c", PROBE, str(theirs)],
                    pass_fds=[theirs],
                    capture_output=True,
                    text=True,
                    timeout=PROBE_S,
                )
            except subprocess.TimeoutExpired as error:
                return f"it did not work: {error}"
            finally:
                os.close(theirs)
            in_force = [float(one) for one in said.read().split()]
    if in_force[:1] != [size]:
        return (done.stderr.strip().splitlines() or ["it is not seen to be in force"])[-1]
    return f"a group around it has only {min(in_force) / 1e6:.1f} MB" if min(in_force) < size else ""
