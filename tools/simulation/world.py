"""One run in one process: the server, all devices and the broker between them, driven by one loop.

    settle: messages, what workers said, and what follows, until nothing follows at once
    then wait for a worker, if any is at work; or else let time pass, to what is due next

Time is virtual and stands still while anything is computed: a round takes as long as its training, no deadline passes
because this machine is slower than a fleet, and nothing ever waits for a timer.
"""

from __future__ import annotations

import contextlib
import json
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from lwfed.cloud_server.course import Course
from lwfed.cloud_server.news import News
from lwfed.cloud_server.server import Server
from lwfed.cloud_server.workshop import FromChild, Process, starter
from lwfed.console import Console
from lwfed.edge_agent.agent import check_data, make_hello
from lwfed.edge_agent.events import Event, Tell, WorkerError, WorkerEvent
from lwfed.errors import StateError, WorkerFailed
from lwfed.tools.endings import leave, on_endings
from lwfed.tools.simulation.device import DROPPED, DROPPED_OUT, START, SimulatedDevice, Surroundings, arrival, drops_out
from lwfed.tools.simulation.pool import Pool
from lwfed.transport.memory import MemoryBroker
from lwfed.wire.messages import Task
from lwfed.wire.topics import Topics

DEVICES_FILE = "devices.json"
MIN_STEP_S = 1e-3
PATIENCE = 3  # deadlines that may pass without any progress: after the first one everybody is asked again

Said = Mapping[str, Any]
Listener = Callable[[str, Said], None]  # of (program, what it said)


class Voice(Console):
    """What the server says, as events for a listener."""

    def __init__(self, listen: Listener) -> None:
        super().__init__(as_json=True)
        self.last_warning = ""
        self._listen = listen

    def say(self, event: str, text: str, **fields: Any) -> None:
        if event == "warning":
            if DROPPED in text:
                return
            self.last_warning = text
        if event not in ("device", "waiting"):  # which come and wait for nobody but us
            self._listen("server", {"event": event, "text": text, **fields})


class World:
    def __init__(self, course: Course, spec: str, dropout: float, workers: int | None, listen: Listener) -> None:
        """Raises DataError, MissingDependency and StateError; starts nothing."""
        config = course.config
        self._now = 0.0
        self._course, self._listen = course, listen
        self._events: queue.SimpleQueue[FromChild | None] = queue.SimpleQueue()  # a signal handler may fill it, unlike Queue
        self._mail: deque[tuple[SimulatedDevice, WorkerEvent]] = deque()
        self._wakeups: dict[SimulatedDevice, float] = {}
        self._interrupted: int | None = None
        self._devices: list[SimulatedDevice] = []
        self._broker = MemoryBroker(log_length=0)
        self._voice = Voice(listen)
        rank = partial(arrival, config.run.seed) if config.rounds.oversample > 1 else None
        self._pool = Pool(config, workers, self._events.put, self._post, rank)
        news = News(self._voice, config, "memory")
        self._server = Server(course, self._broker.transport(), news, self._start_server_worker, until_done=True, clock=lambda: self._now)
        self._kept_at: tuple[int, int] | None = None  # stage and round
        self._progress: tuple[object, ...] = ()
        self._progress_at = 0.0
        source, images = check_data(spec)
        self._data = source.path
        self._hello = make_hello(START, source, images)
        self._drops = partial(drops_out, config.run.seed, probability=dropout)

    def run(self) -> None:
        """Until the run is finished. A signal ends the process, by `leave`, with everything kept for going on."""
        with on_endings(self._interrupt):
            try:
                self._server.begin()
                self._settle()
                self._open_devices()
                while not self._server.over:
                    self._settle()
                    self._check_progress()
                    self._proceed()
            finally:
                self._keep()
                self._pool.end()
                self._server.end()
        self._leave_if_told()

    def _open_devices(self) -> None:
        """One after the other, for participant numbers go by the order of arrival; nothing is delivered before all are there."""
        course = self._course
        around = Surroundings(
            topics=Topics(course.config.run.fleet),
            data=self._data,
            hello=self._hello,
            lender=course.blobs,
            folder=course.root / "devices",
            drops=self._drops,
            pool=self._pool,
            post=self._post,
            tell=self._tell,
        )
        kept, taken = read_devices(course.root), self._taken()
        for number in range(course.config.data.devices):
            name = f"device-{number}"
            device = SimulatedDevice(name, around, self._broker.transport(), kept.get(name), taken.get(name, ()), self._now)
            self._devices.append(device)
            device.open(partial(self._take, device))

    def _taken(self) -> dict[str, list[Task]]:
        """The tasks of this stage by device whose updates the server has: after a kill it knows of more than devices do."""
        store, run = self._course.store, self._course.run_id
        names = {one.participant: one.id for one in store.devices()}
        found: dict[str, list[Task]] = {}
        for one in store.contributions(self._course.state.stage):
            task = Task(run=run, stage=one.stage, round=one.round, participant=one.participant)
            found.setdefault(names[one.participant], []).append(task)
        return found

    # What happens

    def _settle(self) -> None:
        """Everything that needs neither time nor a worker."""
        while True:
            count = self._broker.pump() + self._server.drain() + self._hear() + self._deliver()
            if count == 0:
                self._server.handle(None)
                if self._broker.pump() == 0 and not self._pool.release():
                    break
        place = (self._course.state.stage, self._course.state.round)
        if place != self._kept_at:
            self._kept_at = place
            self._keep()

    def _hear(self) -> int:
        count = 0
        while not self._events.empty():
            self._on_event(self._events.get())
            count += 1
        return count

    def _on_event(self, said: FromChild | None) -> None:
        self._leave_if_told()
        if said is not None:
            self._pool.hear(said)

    def _deliver(self) -> int:
        count = len(self._mail)
        for _ in range(count):
            device, event = self._mail.popleft()
            self._take(device, event)
        return count

    def _proceed(self) -> None:
        """Wait for whoever is at work; when nobody is, let time pass."""
        if self._server.over:
            return
        if self._pool.busy or self._server.busy:
            due = self._pool.next_sample
            with contextlib.suppress(queue.Empty):
                self._on_event(self._events.get(timeout=None if due is None else max(0.0, due - time.monotonic())))
            self._pool.sample()
            return
        times = [*self._wakeups.values(), self._server.next_wakeup(self._now)]
        self._now = max(self._now + MIN_STEP_S, min(time for time in times if time is not None))
        for device in [device for device, due in self._wakeups.items() if due <= self._now]:
            device.poll(self._now)
            self._note_wakeup(device)

    def _take(self, device: SimulatedDevice, event: Event) -> None:
        device.take(event, self._now)
        self._note_wakeup(device)

    def _note_wakeup(self, device: SimulatedDevice) -> None:
        due = device.next_wakeup(self._now)
        if due is None:
            self._wakeups.pop(device, None)
        else:
            self._wakeups[device] = due

    def _post(self, device: SimulatedDevice, event: WorkerEvent) -> None:
        if isinstance(event, WorkerError) and event.kind == DROPPED_OUT:
            self._kept_at = None
        self._mail.append((device, event))

    def _tell(self, name: str, line: Tell) -> None:
        if line.event == "training":
            self._listen(name, {"event": line.event, "text": line.text, **line.fields})

    def _start_server_worker(self, deliver: Callable[[FromChild], None]) -> Process:
        def wake(said: FromChild) -> None:
            deliver(said)
            self._events.put(None)

        return starter(self._course.config.train.threads)(wake)

    def _interrupt(self, number: int) -> None:
        self._interrupted = number
        self._events.put(None)

    def _leave_if_told(self) -> None:
        if self._interrupted is not None:
            click.echo("stopped; nothing is lost, the same command goes on from here", err=True)
            leave(self._interrupted)

    # What is kept

    def _keep(self) -> None:
        """At the end of each round, and when somebody has dropped out. What is too old after a kill is fetched or made again."""
        if self._devices:
            text = json.dumps({device.name: device.keep(self._now) for device in self._devices})
            unfinished = self._course.root / f".{DEVICES_FILE}"
            try:
                unfinished.write_text(text)
                unfinished.replace(self._course.root / DEVICES_FILE)
            except OSError as error:
                raise StateError(f"cannot write {error.filename}: {error.strerror or error}; check free space and permissions") from None

    def _check_progress(self) -> None:
        """A fleet may wait for days until somebody mends its devices; here nobody will. Raises WorkerFailed."""
        state = self._course.state
        progress = (state.phase, state.stage, state.round, len(state.contributed))
        if progress != self._progress or self._pool.busy or self._server.busy:
            self._progress, self._progress_at = progress, self._now
        elif self._now - self._progress_at > PATIENCE * self._course.rules.deadline_s:
            raise WorkerFailed(
                f"stage {state.stage}, round {state.round} cannot go on: {len(state.contributed)} updates, and {state.needed} are needed; "
                f"the last warning was: {self._voice.last_warning or 'none'}"
            )


def read_devices(root: Path) -> dict[str, Any]:
    """What the devices of the run below `root` remember; nothing before they first did."""
    try:
        found: dict[str, Any] = json.loads((root / DEVICES_FILE).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StateError(f"{root / DEVICES_FILE} cannot be read ({error}): delete it, and the devices begin anew") from None
    return found
