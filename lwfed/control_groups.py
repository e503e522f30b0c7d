"""This process's control groups, of both versions, and how often the kernel has ended processes for lack of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
OWN = PROC / "self" / "cgroup"  # names them


@dataclass(frozen=True)
class Hierarchy:
    """How one version says memory."""

    controller: str  # as /proc/self/cgroup has it
    root: str  # below the groups
    limits: tuple[str, ...]
    taken: str
    reclaimable: str  # of memory.stat: cached files, which give way when memory is wanted
    ended: str  # has a line "oom_kill N"


HIERARCHIES = (
    Hierarchy("", "", ("memory.max", "memory.high"), "memory.current", "inactive_file", "memory.events"),
    Hierarchy("memory", "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"),
)


def own_groups(hierarchy: Hierarchy, own: Path = OWN, groups: Path = GROUPS) -> Iterator[Path]:
    """Folders of this process's group and of those that it is in, innermost first; a container may not see all of them."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    root = groups / hierarchy.root
    for path in (path for _, controllers, path in lines if hierarchy.controller in controllers.split(",")):
        group = root / path.lstrip("/")
        yield from (one for one in (group, *group.parents) if one.is_relative_to(root))


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
