"""This process's control groups, of both versions, and how often the kernel has ended processes for lack of memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
OWN = PROC / "self" / "cgroup"  # names them
MOUNTS = "mountinfo"  # beside it: which part of a hierarchy is to be seen
PROCESSES = "cgroup.procs"  # of a group, in both versions


@dataclass(frozen=True)
class Hierarchy:
    """How one version says memory."""

    controller: str  # as /proc/self/cgroup has it
    root: str  # below the groups
    limits: tuple[str, ...]  # what is never exceeded comes first
    taken: str
    peak: str
    reclaimable: str  # of memory.stat: cached files, which give way when memory is wanted
    ended: str  # has a line "oom_kill N"


VERSION_2 = Hierarchy("", "", ("memory.max", "memory.high"), "memory.current", "memory.peak", "inactive_file", "memory.events")
VERSION_1 = Hierarchy(
    "memory",
    "memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "memory.max_usage_in_bytes",
    "total_inactive_file",
    "memory.oom_control",
)
HIERARCHIES = (VERSION_2, VERSION_1)


def limiting(own: Path = OWN, groups: Path = GROUPS) -> Hierarchy | None:
    """The one that limits memory here, for a system has its controller in one at most; None where it is in neither."""
    if next(own_groups(VERSION_1, own, groups), None) is not None:
        return VERSION_1
    try:
        return VERSION_2 if "memory" in (groups / "cgroup.controllers").read_text().split() else None
    except OSError:
        return None


def own_groups(hierarchy: Hierarchy, own: Path = OWN, groups: Path = GROUPS) -> Iterator[Path]:
    """Folders of this process's group and of those that it is in, innermost first; a container may not see all of them."""
    try:
        lines = [line.split(":", 2) for line in own.read_text(errors="surrogateescape").splitlines()]
    except OSError:
        return
    root = groups / hierarchy.root
    seen = _seen(root, own.with_name(MOUNTS))
    for path in (PurePosixPath(path) for _, controllers, path in lines if hierarchy.controller in controllers.split(",")):
        group = root / (path.relative_to(seen) if path.is_relative_to(seen) else path.relative_to("/"))
        yield from (one for one in (group, *group.parents) if one.is_relative_to(root))


def own_group(hierarchy: Hierarchy, own: Path = OWN, groups: Path = GROUPS) -> Path | None:
    """The innermost of them that is to be seen."""
    return next((group for group in own_groups(hierarchy, own, groups) if group.is_dir()), None)


def limits_in_force(own: Path = OWN, groups: Path = GROUPS) -> Iterator[float]:
    """Bytes of every limit that this process is under, of its own group first; infinity where a group says that it has none."""
    if (hierarchy := limiting(own, groups)) is None:
        return
    for group in own_groups(hierarchy, own, groups):
        for limit in hierarchy.limits:
            with contextlib.suppress(OSError):  # a root has none, and a container may not see it
                said = (group / limit).read_text().strip()
                yield math.inf if said == "max" else int(said)


def limit_without_swap(group: Path, size: int) -> None:
    """Let a group of version 1 take `size` bytes, a multiple of a page. Raises OSError."""
    (group / VERSION_1.limits[0]).write_text(str(size))
    (group / "memory.swappiness").write_text("0")  # alone keeps it from swapping where swap is not counted
    counted = group / "memory.memsw.limit_in_bytes"
    if counted.exists():
        counted.write_text(str(size))


def _seen(root: Path, mounts: Path) -> str:
    """The group that `root` shows: in a container perhaps its own."""
    try:
        fields = [line.split() for line in mounts.read_text(errors="surrogateescape").splitlines()]
    except OSError:
        return "/"
    return next((group for _, _, _, group, place, *_ in reversed(fields) if place == str(root)), "/")


class OomKills:
    """Processes that the kernel has ended since this was made: anywhere in the system, or in this process's group."""

    def __init__(self, proc: Path = PROC, groups: Path = GROUPS) -> None:
        files = [proc / "vmstat"]
        for hierarchy in HIERARCHIES:
            files += [group / hierarchy.ended for group in own_groups(hierarchy, proc / OWN.relative_to(PROC), groups)]
        self._before = {file: count for file in files if (count := _count(file)) is not None}

    def happened(self) -> bool | None:
        """Whether there were any; None where the system does not say."""
        if not self._before:
            return None
        return any((_count(file) or 0) > count for file, count in self._before.items())


def _count(file: Path) -> int | None:
    try:
        return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith("oom_kill ")), None)
    except OSError:
        return None
