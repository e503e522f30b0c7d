"""Our programs as processes of this machine, watched through the JSON lines that they say."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from lwfed.cloud_server import tethered
from lwfed.errors import WorkerFailed
from lwfed.tools.endings import leave, on_endings

STOP_S = 10.0
KEPT_LINES = 10


@dataclass(frozen=True)
class Line:
    """One event of a program; None when it has ended."""

    program: str
    said: dict[str, Any] | None


class Programs:
    """Started one by one; all end with the block, and with this process however it ends.

    A signal that ends the demo takes effect in `next` or with the block: within `start` it would lose a process.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()  # a signal handler may fill it, unlike Queue
        self._signals = on_endings(self._interrupt)
        self._interrupted: int | None = None  # the number of the signal
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._last: dict[str, deque[str]] = {}  # what a program said last, for people
        self._readers: list[threading.Thread] = []

    def __enter__(self) -> Programs:
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join()
        for process in self._processes.values():
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self._signals.__exit__(None, None, None)
        if self._interrupted is not None and error is None:
            leave(self._interrupted)

    def start(self, name: str, module: str, *arguments: str) -> None:
        """Run ``python -m module arguments --json``."""
        process = subprocess.Popen(
            tethered.command([sys.executable, "-m", module, *arguments, "--json"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end them in order
        )
        self._processes[name], self._last[name] = process, deque(maxlen=KEPT_LINES)
        errors = threading.Thread(target=self._read_errors, args=(name, process.stderr), daemon=True)
        events = threading.Thread(target=self._read_events, args=(name, process.stdout, errors), daemon=True)
        for reader in (errors, events):
            reader.start()
            self._readers.append(reader)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def next(self) -> Line:
        """Wait for the next event of any program. Raises WorkerFailed, with its last words, when one has failed."""
        line = self._lines.get()
        if self._interrupted is not None:
            leave(self._interrupted)
        assert line is not None
        if line.said is None and (code := self._processes[line.program].wait()) != 0:
            raise WorkerFailed(f"{line.program} ended with exit code {code}; its last lines:\n" + "\n".join(self._last[line.program]))
        return line

    def _interrupt(self, number: int) -> None:
        self._interrupted = number
        self._lines.put(None)

    def _read_events(self, name: str, pipe: IO[str], errors: threading.Thread) -> None:
        for text in pipe:
            said = json.loads(text)
            self._last[name].append(f"  {said['text']}")
            self._lines.put(Line(name, said))
        errors.join()  # so that its last words are complete when its end is told
        self._lines.put(Line(name, None))

    def _read_errors(self, name: str, pipe: IO[str]) -> None:
        for text in pipe:
            self._last[name].append(f"  {text.rstrip()}")
