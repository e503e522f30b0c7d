"""A child process that works for its parent: JSON lines in on its stdin, JSON lines out on a pipe of their own.

Training runs in such a child because only the end of a process reliably gives its memory back, and because its
death (out of memory, a wrong build of torch) must not take the parent with it. A child whose parent dies ends too:
its stdin closes. Its stdout is its parent's stderr: libraries print what they like, even while they are imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, Protocol, get_args

import psutil

from lwfed.control_groups import PROC, OomKills
from lwfed.errors import LwfedError, WorkerFailed

Json = dict[str, Any]
OOM_SCORE = 500  # above its parent's: of 1000, which stand for all memory that there is
OUTPUT_VARIABLE = "LWFED_CHILD_OUTPUT"  # the file descriptor that a child writes its lines to
PIPE_BYTES = 1 << 16  # that a child need not have read
EndKind = Literal["out of memory", "killed", "crashed", "exit"]  # killed: by somebody, with the memory that it had
END_KINDS: tuple[EndKind, ...] = get_args(EndKind)
CRASHES = {signal.SIGSEGV, signal.SIGILL, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE}


@dataclass(frozen=True)
class Said:
    child: Child
    data: Json


@dataclass(frozen=True)
class Ended:
    child: Child
    kind: EndKind
    reason: str  # for people: exit code or signal, and what it means


class Child:
    """One run of ``python -m MODULE``. Events arrive on a thread of its own; `deliver` only enqueues."""

    def __init__(
        self, module: str, deliver: Callable[[Said | Ended], None], env: Mapping[str, str] | None = None, within: Sequence[str] = ()
    ) -> None:
        """`within` is a command that becomes the one that follows it, such as one that limits memory first.

        Raises WorkerFailed where the system has no process, thread or file to give.
        """
        self._deliver, self._oom_kills = deliver, OomKills()
        try:
            self._popen, self._lines = _start([*within, sys.executable, "-m", module], env or {})
        except OSError as error:
            raise WorkerFailed(f"a process of its own cannot be started: {error.strerror or error}") from None
        self.process = psutil.Process(self._popen.pid)  # before the reader may wait for it: from then on its pid may be anybody's
        _give_way(self.pid)
        self._reader = threading.Thread(target=self._read, name=f"read {module}", daemon=True)
        try:
            self._reader.start()
        except RuntimeError as error:
            self.kill()
            self._close_pipes()
            raise WorkerFailed(f"nobody can listen to a process of its own: {error}") from None

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, data: Json) -> None:
        """Hand over one line; a child that is gone is reported by its `Ended`, not here."""
        assert self._popen.stdin is not None
        line = json.dumps(data).encode() + b"\n"
        if len(line) > PIPE_BYTES:
            with contextlib.suppress(AttributeError, OSError):  # Linux: nobody has to wait until the child is through with its imports
                fcntl.fcntl(self._popen.stdin, fcntl.F_SETPIPE_SZ, len(line))
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(line)
            self._popen.stdin.flush()

    def kill(self) -> None:
        """End it now and wait until its memory is free; `Ended` follows."""
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """Let an ended child go, and wait for its last event; idempotent."""
        self._reader.join()
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._popen.stdin, self._lines):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> None:
        for line in self._lines:
            with contextlib.suppress(ValueError):  # the last line of a child that was killed may be cut off
                self._deliver(Said(self, json.loads(line)))
        code, no_memory = self._popen.wait(), self._oom_kills.happened()
        self._deliver(Ended(self, kind_of_end(code, no_memory), describe_exit(code, no_memory)))


def _start(command: Sequence[str], env: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """The process, and the pipe of what it says. Raises OSError."""
    ours, theirs = os.pipe()
    lines = open(ours, "rb")  # noqa: SIM115 - the caller's
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=2,
            pass_fds=[theirs],
            env={**os.environ, **env, OUTPUT_VARIABLE: str(theirs)},
            start_new_session=True,  # Ctrl-C in the terminal reaches the parent alone, which decides what to do
        )
    except OSError:
        lines.close()
        raise
    finally:
        os.close(theirs)
    return process, lines


def _give_way(pid: int) -> None:
    """When memory runs out, let the kernel end the process `pid` before this one and the device's own work: from its imports on."""
    with contextlib.suppress(OSError):
        ours = int((PROC / "self" / "oom_score_adj").read_text())
        (PROC / str(pid) / "oom_score_adj").write_text(str(min(1000, ours + OOM_SCORE)))


def kind_of_end(code: int, no_memory: bool | None) -> EndKind:
    """`no_memory`: the kernel has ended processes for want of memory since this one began; None: it does not say."""
    if code >= 0:
        return "exit"
    if code == -signal.SIGKILL and no_memory is not False:
        return "out of memory"
    return "crashed" if -code in CRASHES else "killed"


def describe_exit(code: int, no_memory: bool | None = None) -> str:
    """For people; `no_memory` is as of `kind_of_end`."""
    if code >= 0:
        return f"ended with exit code {code}: what it said last is above; `edge-agent doctor` checks torch"
    killed = {
        True: "memory ran out",
        False: "somebody did that, or a program like earlyoom; by the kernel's count memory had not run out",
        None: "probably because memory ran out",
    }
    hints: dict[int, str] = {
        signal.SIGKILL: killed[no_memory],
        signal.SIGILL: "torch was built for another processor: see `edge-agent doctor`",
    }
    return f"ended by {_name(-code)}" + (f": {hints[-code]}" if -code in hints else "")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of those for real time most have none
        return f"signal {number}"


class Handler(Protocol):
    def __call__(self, data: Json, say: Callable[[Json], None]) -> None: ...


def serve(handle: Handler, hello: Json) -> None:
    """The child's side: say `hello`, then `handle` each line of stdin in turn until stdin closes.

    An error of ours is said as ``{"event": "error", "kind": class name, "message": text}`` and the child goes on.
    """
    out = os.fdopen(int(os.environ[OUTPUT_VARIABLE]), "w", buffering=1)
    lines: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_feed, args=(lines,), name="stdin", daemon=True).start()

    def say(data: Json) -> None:
        try:
            out.write(json.dumps(data) + "\n")
        except BrokenPipeError:
            os._exit(0)

    say(hello)
    while True:
        try:
            handle(json.loads(lines.get()), say)
        except LwfedError as error:
            say({"event": "error", "kind": type(error).__name__, "message": str(error)})
        except Exception as error:  # the border of the process: whatever it is, the parent must hear of it
            say({"event": "error", "kind": kind_of_error(error), "message": f"{type(error).__name__}: {error}"})


def kind_of_error(error: Exception) -> str:
    """Of one that is not ours. Lack of memory has no class that libraries agree on: torch and ONNX Runtime say it in words."""
    words = any(said in str(error) for said in ("allocate memory", "bad_alloc", "out of memory"))
    return "OutOfMemory" if isinstance(error, MemoryError) or words else "WorkerFailed"


def _feed(lines: queue.Queue[bytes]) -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)
