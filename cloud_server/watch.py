"""Keeps in bounds what whoever reaches a broker can make it take of this machine: its log, and its memory.

mosquitto writes a line for each handshake that fails, and keeps every filter that a device subscribes to.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from pathlib import Path

import psutil

LOOK_EVERY_S = 0.25
LOG_BYTES = 1_000_000
# A thousand devices took 193 MB (docs/RELIABILITY.md), 2000 may join, and the server gives it 512 MB of the model at most.
MEMORY_BYTES = 1.5e9
SHARE = 0.75  # of a smaller machine's memory: one of 1 GB has room for those 512 MB


class Watch:
    """Over one broker, from `start` until it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """The broker appends to `log`."""
        self.excess = ""  # why it was ended
        self._process, self._log = process, log
        self._thread = threading.Thread(target=self._run, name="broker-watch", daemon=True)
        self._closing = threading.Event()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S) and self._process.poll() is None:
            with contextlib.suppress(psutil.Error):  # it has ended since
                self._bound_memory()
            with contextlib.suppress(OSError):  # it is tried again
                bound(self._log)

    def _bound_memory(self) -> None:
        taken, allowed = psutil.Process(self._process.pid).memory_info().rss, min(MEMORY_BYTES, SHARE * psutil.virtual_memory().total)
        if taken > allowed:
            self.excess = f"took {taken / 1e6:.0f} MB of memory, {allowed / 1e6:.0f} are its limit: a device may subscribe without end; it"
            self._process.kill()  # it keeps nothing, and to free all that takes time


def bound(log: Path) -> None:
    """Keep the last part of a log that has grown too large. Raises OSError."""
    with log.open("rb") as file:
        if file.seek(0, os.SEEK_END) <= LOG_BYTES:
            return
        file.seek(-LOG_BYTES // 2, os.SEEK_END)
        last = file.read()
    os.truncate(log, 0)
    with log.open("ab") as file:
        file.write(last[last.find(b"\n") + 1 :])
