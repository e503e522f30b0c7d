"""Memory of a program with all its processes, read from outside. MB are 10^6 bytes.

What counts is the sum: the high-water mark of the process that computes, and the proportional share (PSS) of every other
process of the program at its largest. Files in memory (tmpfs) are added. The sum may exceed what was held at any one instant,
never the reverse, but for what short-lived helpers took between two readings.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil

from lwfed.edge_agent.resources import HIGH_WATER, MB, TMPFS, filesystem, share_mb, status_mb


@dataclass(frozen=True)
class Footprint:
    """One program, from its start to its end."""

    peak_mb: float  # of all its processes, with files in memory
    baseline_mb: float  # of all its processes, with their imports made and neither data nor model
    computing_mb: float  # peak of the process that computes
    others_mb: float  # peak of the sum of all other processes
    swap_mb: float  # peak, not part of `peak_mb`
    files_mb: float  # what the program has left in its folder; part of `peak_mb` where that is in memory
    files_in_memory: bool
    source: str  # VmHWM, or samples where the system keeps no high-water mark
    group_peak_mb: float | None  # by the control group, where the program has one to itself

    @property
    def training_mb(self) -> float:
        """What data, model and training take of the peak."""
        return self.peak_mb - self.baseline_mb


class Watch:
    """Watches the process `root` and all below it; `computing` is the one whose high-water mark counts."""

    def __init__(self, root: int, proc: Path = Path("/proc")) -> None:
        self._root = root
        self._computing = root
        self._proc = proc
        self._baseline_mb = self._start_mb = 0.0
        self._computing_mb = self._others_mb = self._swap_mb = 0.0
        self._marked = True

    def ready(self, computing: int, before_mb: float) -> float:
        """Imports are made: the baseline; `before_mb` is the high-water mark of `computing` if it was set back since."""
        self._start_mb = self._computing_mb + self._others_mb
        self._computing, self._computing_mb = computing, before_mb
        held, others, _ = self._read()
        self._others_mb = others
        self._baseline_mb = held + others
        return self._baseline_mb

    def sample(self) -> None:
        held, others, swap = self._read()
        mark = status_mb(self._proc / str(self._computing), HIGH_WATER)
        self._marked &= mark is not None
        self._computing_mb = max(self._computing_mb, held, mark or 0.0)
        self._others_mb = max(self._others_mb, others)
        self._swap_mb = max(self._swap_mb, swap)

    def cpu_s(self) -> float:
        """Seconds that the computing process has been on processors so far; 0 once it has ended."""
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self._computing).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def finish(self, folder: Path, group_peak_mb: float | None) -> Footprint:
        """While the processes are still there."""
        self.sample()
        files, in_memory = size_mb(folder), filesystem(folder) in TMPFS
        peak = max(self._start_mb, self._computing_mb + self._others_mb)
        return Footprint(
            peak_mb=round(peak + files * in_memory, 1),
            baseline_mb=round(self._baseline_mb, 1),
            computing_mb=round(self._computing_mb, 1),
            others_mb=round(self._others_mb, 1),
            swap_mb=round(self._swap_mb, 1),
            files_mb=round(files, 1),
            files_in_memory=in_memory,
            source="VmHWM" if self._marked else "samples",
            group_peak_mb=group_peak_mb,
        )

    def _read(self) -> tuple[float, float, float]:
        """MB now: resident of the computing process, share of the others, swap of all."""
        held = others = swap = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if process.pid == self._computing:
                    held = process.memory_info().rss / MB
                else:
                    others += share_mb(process)  # walks all pages, which the one that computes would feel
                swap += status_mb(self._proc / str(process.pid), "VmSwap") or 0.0
        return held, others, swap

    def _processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._root)
            return [root, *root.children(recursive=True)]
        return []


def size_mb(folder: Path) -> float:
    """Of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MB
