"""The agent's control process: one thread, one queue of what happened, and a session that says what to do.

It stays small (no torch, no numpy) and outlives every training process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import queue
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

import lwfed
from lwfed.blobs import BlobStore
from lwfed.child import Ended, Said
from lwfed.data import Source, open_source
from lwfed.edge_agent import events
from lwfed.edge_agent.events import Effect, EndWorker, Exit, Show, StartWorker, Stop, Tell, Train
from lwfed.edge_agent.identity import announcement_verifier
from lwfed.edge_agent.journal import Journal
from lwfed.edge_agent.process import FromChild, TrainingProcess
from lwfed.edge_agent.resources import share_mb
from lwfed.edge_agent.screen import Screen
from lwfed.edge_agent.session import Session
from lwfed.edge_agent.work import Places, Work
from lwfed.errors import ConfigError, MissingDependency, TransportError, WorkerFailed
from lwfed.signals import on_signals
from lwfed.transport.base import Transport, Will
from lwfed.wire.messages import Hello, Start, State, encode
from lwfed.wire.topics import Topics

Raw = events.Event | FromChild
JOURNAL = "journal.sqlite"
LEAST_TORCH_MB = 80.0  # of a process that has imported torch, whatever its build: half of what 2.13 without CUDA takes on x86


@dataclass(frozen=True)
class Join:
    """What `edge-agent join` was told."""

    data: str
    fleet: str
    name: str
    state: Path
    wait_s: float
    budget_mb: float | None = None  # memory for all processes of the agent; None: a share of what is there
    device: str | None = None  # its name, where it is enrolled


def torch_version() -> str | None:
    """Without importing it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("torch")
    return None


def check_data(spec: str) -> tuple[Source, int]:
    """The source, and how many images there seem to be (0: unknown). Raises DataError and MissingDependency."""
    if torch_version() is None:
        raise MissingDependency(
            "training needs torch: pip install 'lwfed[train]', on a Raspberry Pi 'lwfed[pi]', on a Jetson NVIDIA's build"
        )
    source = open_source(spec)
    return source, source.check() or 0


def check_budget(budget_mb: float, measured_mb: float | None) -> None:
    """`measured_mb`: of a training process, before any data. Raises ConfigError where nothing could be trained."""
    ours, theirs = share_mb(), LEAST_TORCH_MB if measured_mb is None else measured_mb
    if budget_mb > ours + theirs:
        return
    how = "at least, with any torch" if measured_mb is None else f"with torch {torch_version()}, as measured"
    raise ConfigError(
        f"--memory-budget {budget_mb:g}MB: before any data the agent takes {ours:.0f} MB here, and its training process {theirs:.0f} MB "
        f"{how}; give it more than {ours + theirs:.0f} MB, and what training takes: `edge-agent profile` says how much"
    )


class Agent:
    def __init__(self, join: Join, transport: Transport, screen: Screen) -> None:
        """Raises ConfigError, DataError, MissingDependency and StateError; connects to nothing."""
        source, images = check_data(join.data)
        self._transport, self._screen = transport, screen
        self._queue: queue.SimpleQueue[Raw] = queue.SimpleQueue()  # may be filled by a signal handler, unlike Queue
        self._process: TrainingProcess | None = None
        self._journal = Journal(join.state / JOURNAL, join.name, join.device)
        self._topics = Topics(join.fleet)
        device = self._journal.device
        if join.budget_mb is not None:
            check_budget(join.budget_mb, self._journal.baseline_mb(torch_version() or ""))
        places = Places(source.path, kept=join.state / "images", out=join.state / "update.safetensors", budget_mb=join.budget_mb)
        held, spool = BlobStore(join.state / "model"), BlobStore(join.state / "updates")
        work = Work(device, self._topics, self._journal, held, spool, places, transport)
        self._start = Start(boot=self._journal.boot, nonce=secrets.token_hex(8))
        hello = make_hello(self._start, source, images)
        believe = announcement_verifier(join.state, join.fleet) if join.device else None
        self._session = Session(self._topics, hello, self._journal, work, transport, join.wait_s, time.monotonic(), believe)

    def run(self) -> None:
        """Until SIGINT or SIGTERM; raises what makes it impossible to go on."""
        with self._running():
            ended = self._execute(self._session.begin())
            while ended is None:
                event = self._translate(self._wait())
                now = time.monotonic()
                if event is not None:
                    ended = self._execute(self._session.handle(event, now))
                ended = ended or self._execute(self._session.poll(now))
            if ended.error is not None:
                raise ended.error

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        device, start = self._journal.device, self._start
        topic = self._topics.from_device(device, "state")
        with on_signals(lambda: self._queue.put(Stop())):
            try:
                for filter in self._topics.for_device(device):
                    self._transport.subscribe(filter)
                self._transport.open(device, Will(topic, encode(State(state="lost", start=start))), self._queue.put)
                yield
            finally:
                with contextlib.suppress(TransportError):  # however it ends, or the server waits for a device that is gone
                    self._transport.publish(topic, encode(State(state="stopped", start=start)), retain=True)
                self._end_worker()
                self._transport.close()
                self._journal.close()
                self._screen.end_bar()

    def _wait(self) -> Raw | None:
        """The next event, or None when it is time to do something by itself."""
        now = time.monotonic()
        sample = self._process.next_sample if self._process else None
        times = [time for time in (self._session.next_wakeup(now), sample) if time is not None]
        try:
            return self._queue.get(timeout=max(0.0, min(times) - now) if times else None)
        except queue.Empty:
            return None

    def _translate(self, raw: Raw | None) -> events.Event | None:
        """What the session understands of an event; children that were ended on purpose are not its concern."""
        process = self._process
        if process is not None:
            process.sample()
        if not isinstance(raw, Said | Ended):
            return raw
        if process is None or not process.speaks(raw):
            return None
        if isinstance(raw, Ended):
            self._process = None
        event = process.hear(raw)
        if isinstance(event, events.WorkerReady) and process.baseline_mb:  # 0: it has ended meanwhile
            self._journal.note_baseline(torch_version() or "", round(process.baseline_mb, 1))
        return event

    # Effects

    def _execute(self, effects: list[Effect]) -> Exit | None:
        for effect in effects:
            match effect:
                case Tell():
                    self._screen.tell(effect)
                case Show():
                    self._screen.show(effect)
                case StartWorker(threads):
                    self._end_worker()
                    try:
                        self._process = TrainingProcess(self._queue.put, threads)
                    except WorkerFailed as error:
                        self._queue.put(events.WorkerError("exit", str(error)))
                case Train(order, sample_s):
                    assert self._process is not None
                    self._process.train(order, sample_s)
                case EndWorker():
                    self._end_worker()
                case Exit():
                    return effect
                case _:
                    self._transport.execute(effect)
        return None

    def _end_worker(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = None


def make_hello(start: Start, source: Source, images: int) -> Hello:
    return Hello(
        start=start,
        lwfed=lwfed.__version__,
        python=platform.python_version(),
        torch=torch_version(),
        machine=platform.machine(),
        cores=os.cpu_count() or 1,
        memory_mb=round(psutil.virtual_memory().total / 1e6),
        images=images,
        source=source.label,
    )
