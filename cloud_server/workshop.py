"""The server's side of its worker process: one job at a time, done again when the process dies.

The process is kept for `worker.linger_s` after a job, as on a device: a round with calibration then spares the imports
(two seconds, of torch) and the decoding of images; between rounds that take longer its memory goes back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lwfed import disk, errors
from lwfed.child import Child, Ended, Json, Said
from lwfed.errors import LwfedError, WorkerFailed

MODULE = "lwfed.cloud_server.worker"
MAX_TRIES = 3

FromChild = Said | Ended


class Process(Protocol):
    """What is used of a Child."""

    def send(self, data: Json) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


Starter = Callable[[Callable[[FromChild], None]], Process]


def starter(threads: int) -> Starter:
    return lambda deliver: Child(MODULE, deliver, {"OMP_NUM_THREADS": str(threads)})


class Workshop:
    """`deliver` takes the events of the process, from a thread of its own, and only enqueues them; `warn` tells people."""

    def __init__(
        self, start: Starter, deliver: Callable[[FromChild], None], warn: Callable[[str], None], folder: Path, linger_s: float
    ) -> None:
        self.folder = folder  # where results of the present job are written
        self._start = start
        self._deliver, self._warn = deliver, warn
        self._linger_s = linger_s
        self._process: Process | None = None
        self._job: Json | None = None
        self._tries = 0
        self._idle_until: float | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None

    def submit(self, job: Json) -> None:
        """Begin `job`; raises RuntimeError while another one is under way."""
        if self.busy:
            raise RuntimeError(f"the worker is busy with {self._job}")
        self._job, self._tries, self._idle_until = job, 0, None
        self._begin()

    def on(self, event: FromChild, now: float) -> Json | None:
        """The result of the job when `event` brings it.

        Raises the LwfedError with which the job failed; WorkerFailed when its process keeps dying.
        """
        if isinstance(event, Ended):
            event.child.close()
        if event.child is not self._process:
            return None
        if isinstance(event, Ended):
            self._process = None
            if self.busy:
                self._again(f"the worker process {event.reason}")
            return None
        match event.data["event"]:
            case "ready":
                return None
            case "error":
                self._failed(event.data["kind"], event.data["message"], now)
                return None
        self._job, self._idle_until = None, now + self._linger_s
        return event.data

    def poll(self, now: float) -> None:
        """End the process when it has been idle for long enough."""
        if self._idle_until is not None and now >= self._idle_until:
            self._idle_until = None
            self.end()

    def next_wakeup(self) -> float | None:
        return self._idle_until

    def end(self) -> None:
        """End the process now, with whatever it does; idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.close()
        self._process = self._job = None

    def _begin(self) -> None:
        self._tries += 1
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise disk.unusable(f"cannot write {self.folder}: {error.strerror or error}", error) from error
        if self._process is None:
            self._process = self._start(self._deliver)
        assert self._job is not None
        self._process.send(self._job)

    def _failed(self, kind: str, message: str, now: float) -> None:
        found = getattr(errors, kind, None)
        if isinstance(found, type) and issubclass(found, LwfedError) and found is not WorkerFailed:
            self._job, self._idle_until = None, now + self._linger_s
            raise found(message)
        process, self._process = self._process, None  # what went wrong may have left it in any condition
        if process is not None:
            process.kill()
        self._again(message)

    def _again(self, reason: str) -> None:
        assert self._job is not None
        what = self._job["do"]
        if self._tries >= MAX_TRIES:
            self._job = None
            raise WorkerFailed(
                f"the server could not {what} in {MAX_TRIES} attempts: {reason}; the state is safe, the same command goes on from here"
            )
        self._warn(f"the server could not {what}: {reason}; it tries again (attempt {self._tries + 1} of {MAX_TRIES})")
        self._begin()
