"""The server and the devices of a schedule: what outlives a process, and the process with the real machines in it.

A process ends by `Killed` where the schedule says so: at a transaction that is then undone, or before something is said.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Protocol

from lwfed.blobs import BlobStore
from lwfed.cloud_server.course import Course
from lwfed.cloud_server.news import News
from lwfed.cloud_server.server import Server
from lwfed.cloud_server.workshop import FromChild, Process
from lwfed.config import RunConfig
from lwfed.console import Console
from lwfed.edge_agent.events import Event, Stop, Tell, WorkerError
from lwfed.edge_agent.facts import MemoryFacts
from lwfed.edge_agent.journal import Identity, Journal
from lwfed.edge_agent.work import MAX_KILLED, Places
from lwfed.errors import Diverged, InvalidPayload, TransportError, WorkerFailed
from lwfed.tools.faults import canned
from lwfed.tools.faults.disk import Disk
from lwfed.tools.faults.fuse import Fuse, FusedFacts, FusedTransport, Killed
from lwfed.tools.faults.schedule import Kill
from lwfed.tools.faults.store import Kept, MemoryStore
from lwfed.tools.simulation.virtual import VirtualDevice
from lwfed.transport.memory import MemoryBroker
from lwfed.wire.messages import Hello, Start, State, encode
from lwfed.wire.topics import Topics

EPOCH_S = 1e9  # Unix time when a schedule begins
RESTART_S = 5.0  # after which a service starts again what has ended by itself
MEMORY = ("out of memory", "OutOfMemory")  # kinds of failures
KEEP_ALIVE_S = 90.0  # until a broker misses a client that has vanished
RESTARTED = (TransportError, WorkerFailed, Diverged)  # errors after which docs/EXIT_CODES.md lets a service start again


class Surroundings(Protocol):
    """What a party sees of its world."""

    now: float
    broker: MemoryBroker
    config: RunConfig
    disk: Disk
    random: Random
    topics: Topics

    def later(self, seconds: float, action: Callable[[], None]) -> None: ...
    def note(self, who: str, text: str) -> None: ...
    def published(self, who: str, topic: str, payload: bytes) -> None: ...


class Party(ABC):
    """A machine on which one process runs, or does not."""

    def __init__(self, name: str, around: Surroundings, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.fails: deque[str] = deque()  # how the next jobs of its worker end
        self.starts = 0
        self._around = around
        self._fuse = Fuse()  # of the process that runs
        self._link: FusedTransport | None = None
        folder.mkdir(parents=True)

    @property
    @abstractmethod
    def client_id(self) -> str: ...
    @abstractmethod
    def _begin(self, link: FusedTransport) -> None: ...
    @abstractmethod
    def _end(self) -> None:
        """Of a process that is dead already."""

    @abstractmethod
    def poll(self) -> None:
        """Do what is due."""

    @abstractmethod
    def next_wakeup(self) -> float | None: ...

    @property
    def up(self) -> bool:
        return self._link is not None

    def start(self) -> None:
        if self.up:
            return
        self.starts += 1
        self._fuse = Fuse()
        self._around.broker.restore(self.client_id)
        self._link = FusedTransport(self._around.broker, self._fuse, partial(self._around.published, self.name))
        self._around.note(self.name, f"starts for the {self.starts}. time")
        self._live(self._begin, self._link)

    def kill(self, how: Kill) -> None:
        """At once, or when it passes the point that the fault names."""
        if how.point == "anywhere":
            self._perish(how)
        else:
            self._fuse.kill = how

    def spare(self) -> None:
        """Do not kill it any more."""
        self._fuse.kill = None

    def _perish(self, how: Kill) -> None:
        self.die(how.power)
        self._around.later(how.for_s, self.start)

    def die(self, power: bool = False) -> None:
        """At once; the broker hears of it, unless the `power` went with it."""
        link, self._link = self._link, None
        if link is None:
            return
        self._around.note(self.name, "dies, and its machine with it" if power else "dies")
        if power:
            self._around.broker.stall(link.client_id)
            self._around.later(KEEP_ALIVE_S, link.vanish)
        else:
            link.vanish()
        self._end()
        if power:
            self._around.disk.lose_power(self.folder, self._around.random)

    def _close(self) -> None:
        """The process ends by itself: no will is sent."""
        if self._link is not None:
            self._link.close()
            self._link = None
            self._end()

    def _live(self, action: Callable[..., Any], *arguments: object) -> Any:
        """What the process does, which may end of it: the action's result, or None."""
        try:
            return action(*arguments)
        except Killed as killed:
            self._perish(killed.how)
        except RESTARTED as error:
            self._around.note(self.name, f"ends: {error}")
            self.die()
            self._around.later(RESTART_S, self.start)
        return None

    def next_failure(self) -> str | None:
        return self.fails.popleft() if self.fails else None


class ServerParty(Party):
    course: Course

    def __init__(self, around: Surroundings, folder: Path) -> None:
        super().__init__("server", around, folder)
        self._kept = Kept()
        self._server: Server | None = None
        self._worker: canned.ServerWorker | None = None  # ends with the server

    @property
    def client_id(self) -> str:
        return f"lwfed-{self._around.config.run.fleet}-server"

    @property
    def finished(self) -> bool:
        """Whether it has nothing left to do, ever."""
        return self._server is not None and self.course.state.over and self.course.encoder_path.is_file()

    def begin_anew(self) -> None:
        """Its state is deleted; what it starts for next is another run."""
        self.die()
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self._kept = Kept(self._kept.number + 1)

    def hear(self) -> bool:
        """Take what has arrived; whether that was anything."""
        return self._server is not None and bool(self._live(self._server.drain))

    def poll(self) -> None:
        if self._server is not None:
            self._live(self._server.handle, None)

    def next_wakeup(self) -> float | None:
        return self._server.next_wakeup(self._around.now) if self._server else None

    def _begin(self, link: FusedTransport) -> None:
        around = self._around
        store = MemoryStore(self._kept, around.config.run.name, self._unix_time)
        self.course = Course(around.config, self.folder, self._unix_time, store=store)
        news = News(_Voice(partial(around.note, self.name)), around.config, "memory")
        self._server = Server(self.course, link, news, self._start_worker, clock=lambda: around.now)
        self._server.begin()

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        if self._server is not None:
            self.course.store.close()
        self._server = self._worker = None

    def _unix_time(self) -> float:
        """What the store asks for within every transaction that writes."""
        self._fuse.at_commit()
        return EPOCH_S + self._around.now

    def _start_worker(self, deliver: Callable[[FromChild], None]) -> Process:
        def later(action: Callable[[], None]) -> None:
            self._around.later(self._around.random.uniform(0.1, 5.0), action)

        self._worker = canned.ServerWorker(self._around.config, deliver, later, self.next_failure)
        return self._worker


class DeviceParty(Party):
    def __init__(self, number: int, around: Surroundings, folder: Path) -> None:
        super().__init__(f"device-{number}", around, folder)
        self._disks = 0
        self._facts: dict[str, str] = {}
        self._agent: CannedAgent | None = None
        self._new_disk()

    @property
    def client_id(self) -> str:
        return self.name if self._disks == 1 else f"{self.name}-{self._disks}"

    @property
    def owes(self) -> str:
        """What its journal says is not done with; empty when it is clean."""
        journal = Journal(MemoryFacts(self._agent.facts.held if self._agent else self._facts))
        what = {"an update": journal.update, "a task": journal.task}
        return " and ".join(name for name, fact in what.items() if fact is not None)

    def _perish(self, how: Kill) -> None:
        super()._perish(how)
        if how.disk:
            self._new_disk()

    def leave(self) -> None:
        if self._agent is not None:
            self._around.note(self.name, "is ended by its owner")
            self._live(self._agent.leave, self._around.now)
            self._close()

    def mend(self) -> None:
        """Start it, also where it cannot train until it is started anew."""
        if self._agent is not None and self._agent.unfit:
            self.leave()
        self.start()

    def poll(self) -> None:
        if self._agent is not None:
            self._live(self._agent.poll, self._around.now)

    def next_wakeup(self) -> float | None:
        return self._agent.next_wakeup(self._around.now) if self._agent else None

    def take(self, agent: CannedAgent, event: Event) -> None:
        if agent is self._agent:
            self._live(agent.take, event, self._around.now)

    def _begin(self, link: FusedTransport) -> None:
        self._agent = agent = CannedAgent(self, FusedFacts(self._facts, self._fuse), link, self._around)
        agent.open(partial(self.take, agent))

    def _end(self) -> None:
        if self._agent is not None:
            self._facts = self._agent.facts.held
            self._agent.end()
        self._agent = None

    def _new_disk(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self._disks += 1
        self.ran_short = False  # a worker of it has run out of memory, or may have, since its disk was new
        self._facts = {"device": Identity(device=self.client_id, boot=0).model_dump_json()}


class CannedAgent(VirtualDevice):
    """One start of an agent whose worker is canned."""

    def __init__(self, party: DeviceParty, facts: FusedFacts, link: FusedTransport, around: Surroundings) -> None:
        journal = Journal(facts)
        folder = party.folder
        about = {"lwfed": "0", "python": "3", "torch": "canned", "machine": "canned", "source": "folder"}
        hello = Hello(start=Start(boot=journal.boot, nonce=f"{party.starts:016x}"), cores=1, memory_mb=1000.0, images=20, **about)
        held, spool = BlobStore(folder / "model"), BlobStore(folder / "updates")
        places = Places("images", kept=folder / "images", out=folder / "update.safetensors")
        super().__init__(around.topics, hello, journal, held, spool, places, link, around.now)
        self.facts = facts
        self.unfit = False  # it has said that it cannot train before it is started anew
        self._party, self._around = party, around
        self._worker = 0  # number of the worker that runs; what an earlier one says is not heard
        self._killed = 0  # workers in the present task

    def leave(self, now: float) -> None:
        """As an agent that is told to end: it says goodbye."""
        self._session.handle(Stop(), now)
        self._transport.publish(
            self._topics.from_device(self.name, "state"), encode(State(state="stopped", start=self._start)), retain=True
        )

    def end(self) -> None:
        """Its process is gone, and a worker ends with it."""
        self._end_worker()

    def _start_worker(self) -> None:
        self._worker += 1
        self._later((0.1, 3.0), lambda: self._say(canned.READY))

    def _end_worker(self) -> None:
        self._worker += 1

    def _train(self, order: Mapping[str, Any], sample_s: float) -> None:
        self._later((0.0, 0.1), lambda: self._plan(order))

    def _plan(self, order: Mapping[str, Any]) -> None:
        try:
            model, patched = canned.receive(order, canned.config_of(order))
        except InvalidPayload as error:
            self._say(WorkerError("InvalidPayload", str(error)))
            return
        self._later((0.0, 0.1), lambda: self._say(canned.PROGRESS))
        self._later((0.1, 20.0), lambda: self._finish(order, model))
        if patched is not None:
            self._say(patched)
        planned = canned.planned(order)
        if planned != canned.PLANNED and not self._party.ran_short:
            raise RuntimeError(f"a device whose memory never ran out plans {planned}")
        self._say(planned)

    def _finish(self, order: Mapping[str, Any], model: canned.Model) -> None:
        if kind := self._party.next_failure():
            self._killed += kind == "killed"
            self._party.ran_short |= kind in MEMORY or self._killed > MAX_KILLED
            self._say(WorkerError(kind, "as the schedule says"))
            return
        done = canned.train(order, canned.config_of(order), model)
        self._say(done)

    def _say(self, event: Event) -> None:
        self._party.take(self, event)

    def _later(self, range_s: tuple[float, float], action: Callable[[], None]) -> None:
        worker = self._worker

        def unless_ended() -> None:
            if worker == self._worker:
                action()

        self._around.later(self._around.random.uniform(*range_s), unless_ended)

    def _tell(self, line: Tell) -> None:
        if line.event == "task":
            self._killed = 0
        self.unfit = self.unfit or line.fields.get("code") in ("data", "unfit")
        self._around.note(self.name, line.text)


class _Voice(Console):
    """What the server says to people."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(as_json=True)
        self._note = note

    def say(self, event: str, text: str, **fields: Any) -> None:
        self._note(text)
