"""The agent's session, work and journal as a shell of simulations: without a process, a queue or a clock of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from lwfed.blobs import BlobStore, Holdings
from lwfed.edge_agent.events import Effect, EndWorker, Event, Exit, Show, StartWorker, Tell, Train
from lwfed.edge_agent.journal import Journal
from lwfed.edge_agent.session import Session
from lwfed.edge_agent.work import Places, Work
from lwfed.errors import LwfedError
from lwfed.transport.base import Transport, Will
from lwfed.wire.messages import Hello, State, encode
from lwfed.wire.topics import Topics

FIRST_CONNECTION_S = 15.0


class VirtualDevice(ABC):
    """One start of an agent. What its worker does is for subclasses to say."""

    def __init__(
        self,
        topics: Topics,
        hello: Hello,
        journal: Journal,
        held: Holdings,
        spool: BlobStore,
        places: Places,
        transport: Transport,
        now: float,
    ) -> None:
        self.name = journal.device
        self._topics, self._start, self._transport = topics, hello.start, transport
        work = Work(self.name, topics, journal, held, spool, places, transport)
        self._session = Session(topics, hello, journal, work, transport, FIRST_CONNECTION_S, now)

    def open(self, take: Callable[[Event], None]) -> None:
        """Connect; `take` gets the transport's events."""
        for filter in self._topics.for_device(self.name):
            self._transport.subscribe(filter)
        will = Will(self._topics.from_device(self.name, "state"), encode(State(state="lost", start=self._start)))
        self._transport.open(self.name, will, take)
        self._execute(self._session.begin())

    def take(self, event: Event, now: float) -> None:
        """Raises the LwfedError that would end an agent."""
        self._execute(self._session.handle(event, now))
        self.poll(now)

    def poll(self, now: float) -> None:
        self._execute(self._session.poll(now))

    def next_wakeup(self, now: float) -> float | None:
        return self._session.next_wakeup(now)

    def _execute(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case StartWorker():
                    self._start_worker()
                case Train(order, sample_s):
                    self._train(order, sample_s)
                case EndWorker():
                    self._end_worker()
                case Tell():
                    self._tell(effect)
                case Show():
                    pass
                case Exit(error):
                    raise error or LwfedError(f"{self.name} has ended")
                case _:
                    self._transport.execute(effect)

    @abstractmethod
    def _start_worker(self) -> None: ...
    @abstractmethod
    def _train(self, order: Mapping[str, Any], sample_s: float) -> None: ...
    @abstractmethod
    def _end_worker(self) -> None: ...
    @abstractmethod
    def _tell(self, line: Tell) -> None: ...
