"""Memory of the training process, read from outside while it works. MB are 10^6 bytes.

A curve of samples misses what happens between them; the kernel's own high-water mark (VmHWM) does not. It is set back
at the start of each task by writing 5 to clear_refs, which needs no privilege. Not `ru_maxrss`: a child inherits its
parent's. Where there is no /proc the peak is that of the samples, and marked so.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, Literal

import psutil

from lwfed.control_groups import GROUPS, HIERARCHIES, OWN, Hierarchy, own_groups
from lwfed.wire.report import MAX_CURVE, Memory, Reading

MB = 1e6
HIGH_WATER = "VmHWM"
TMPFS = {"tmpfs", "ramfs"}  # file systems in memory
SHARE = 0.8  # of what is available, where no budget is given


class Meter:
    """Watches one process; `now` is in seconds on any clock."""

    def __init__(self, process: psutil.Process, proc: Path = Path("/proc")) -> None:
        self._process = process
        self._proc = proc / str(process.pid)
        self.baseline_mb = 0.0
        self.rss_mb = 0.0  # at the last sample
        self._curve: list[Reading] = []
        self._every = 1  # keeps one sample of so many
        self._count = 0
        self._peak_mb = 0.0
        self._start = 0.0
        self._marked = False

    def take_baseline(self) -> None:
        """The process has made its imports and holds neither data nor model."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.baseline_mb = self.rss_mb = self._process.memory_info().rss / MB

    def begin(self, now: float) -> None:
        """A task starts."""
        self._curve, self._every, self._count, self._peak_mb, self._start = [], 1, 0, 0.0, now
        self._marked = self._reset_mark()
        self.sample(now)

    def sample(self, now: float) -> None:
        try:
            memory = self._process.memory_full_info()
        except psutil.Error:
            return  # it has just ended; its end is reported elsewhere
        self.rss_mb = memory.rss / MB
        self._peak_mb = max(self._peak_mb, self.rss_mb, status_mb(self._proc, HIGH_WATER) or 0.0)
        self._keep(
            Reading(
                t_s=round(now - self._start, 2),
                rss_mb=round(self.rss_mb, 2),
                uss_mb=round(memory.uss / MB, 2),
                swap_mb=round(getattr(memory, "swap", 0) / MB, 2),
                available_mb=round(psutil.virtual_memory().available / MB, 1),
            )
        )

    def finish(self, now: float) -> Memory:
        """What the task took."""
        self.sample(now)
        source: Literal["VmHWM", "samples"] = "VmHWM" if self._marked else "samples"
        return Memory(baseline_mb=round(self.baseline_mb, 2), peak_mb=round(self._peak_mb, 2), peak_source=source, curve=tuple(self._curve))

    def _keep(self, reading: Reading) -> None:
        """Evenly spaced over a task of any length: when the curve is full, every other reading goes."""
        if self._count % self._every == 0:
            if len(self._curve) == MAX_CURVE:
                self._curve = self._curve[::2]
                self._every *= 2
            if self._count % self._every == 0:
                self._curve.append(reading)
        self._count += 1

    def _reset_mark(self) -> bool:
        try:
            (self._proc / "clear_refs").write_text("5")
        except OSError:
            return False
        return status_mb(self._proc, HIGH_WATER) is not None


def status_mb(proc: Path, field: str) -> float | None:
    """A `field` of the status of the process whose folder is `proc`; None where the system keeps none."""
    try:
        for line in (proc / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 / MB
    except OSError:
        pass
    return None


def resident_mb() -> float:
    """What this process has in memory (RSS), as its high-water mark counts."""
    return float(psutil.Process().memory_info().rss) / MB


def share_mb(process: psutil.Process | None = None) -> float:
    """The proportional share (PSS) of a process, by default of this one: pages that several hold count once in all.

    RSS where the system keeps no shares. Raises psutil.Error for a process that has ended.
    """
    process = process or psutil.Process()
    try:
        memory: Any = process.memory_full_info()
    except (OSError, psutil.AccessDenied):
        memory = process.memory_info()
    return float(getattr(memory, "pss", 0) or memory.rss) / MB


def own_share_bytes() -> float:
    """What training takes at most where nobody said a budget."""
    return SHARE * available_bytes()


def available_bytes(own: Path = OWN, groups: Path = GROUPS) -> float:
    """What this process may still take: of the system's memory, and of the limits of its control groups (both versions)."""
    found = float(psutil.virtual_memory().available)
    for hierarchy in HIERARCHIES:
        for group in own_groups(hierarchy, own, groups):
            found = min(found, _left_bytes(group, hierarchy))
    return max(0.0, found)


def _left_bytes(group: Path, hierarchy: Hierarchy) -> float:
    """Until the lowest limit of `group`; infinity where there is none, which is said by a word, or by no file."""
    left = math.inf
    for limit in hierarchy.limits:
        with contextlib.suppress(OSError, ValueError):
            left = min(left, int((group / limit).read_text()) - int((group / hierarchy.taken).read_text()))
    with contextlib.suppress(OSError, ValueError, KeyError):
        left += int(dict(line.split() for line in (group / "memory.stat").read_text().splitlines())[hierarchy.reclaimable])
    return left


def filesystem(folder: Path) -> str:
    """Kind of the file system that holds `folder`: ext4, tmpfs, ...; empty where that cannot be told."""
    holders = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return max(holders, key=lambda part: len(part.mountpoint)).fstype if holders else ""
