"""The memory of a server's workers, which live for a job and are gone when it is done: looked at again and again."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil

from lwfed.edge_agent.resources import HIGH_WATER, status_mb

MODULE = "lwfed.cloud_server.worker"
LOOK_S = 0.05


class Workers:
    """As a context: the largest high-water mark of those that are at work while it lasts. It misses what grows within a look."""

    def __init__(self, server: psutil.Process) -> None:
        self.peak_mb = 0.0  # 0 where none was seen, or the system keeps no mark
        self._server, self._over = server, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Workers:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                workers = [child for child in self._server.children() if MODULE in child.cmdline()]
            except psutil.Error:  # one has just ended
                continue
            marks = (status_mb(Path("/proc") / str(worker.pid), HIGH_WATER) for worker in workers)
            self.peak_mb = max(self.peak_mb, *(mark or 0.0 for mark in marks), 0.0)
