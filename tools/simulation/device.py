"""A device of a simulation: the agent's session, work and journal, without a process, a queue or a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwfed.blobs import BlobStore
from lwfed.edge_agent.events import Effect, EndWorker, Event, Exit, Show, StartWorker, Stop, Tell, Train, WorkerError
from lwfed.edge_agent.facts import MemoryFacts
from lwfed.edge_agent.journal import Identity, Journal
from lwfed.edge_agent.session import Session
from lwfed.edge_agent.work import Places, Work
from lwfed.errors import LwfedError
from lwfed.seeds import derive
from lwfed.tools.simulation.holdings import BorrowedBlobs
from lwfed.tools.simulation.pool import Pool, Post
from lwfed.transport.base import Will
from lwfed.transport.memory import MemoryTransport
from lwfed.wire.messages import Hello, State, encode
from lwfed.wire.topics import Topics

FIRST_CONNECTION_S = 15.0
BOOT = 1  # always: with the simulation the server is stopped and started, and what devices do goes on
DROPPED_OUT = "DroppedOut"
DROPPED = "it drops out of this round, as the simulation has drawn"


def drops_out(seed: int, stage: int, round: int, participant: int, probability: float) -> bool:
    """Whether a chosen device fails to contribute in a round."""
    return derive(seed, "dropout", stage, round, participant) < probability * 2**63


def arrival(seed: int, order: Mapping[str, Any]) -> int:
    """The smaller, the earlier the result of this order to train arrives, among those of its round."""
    return derive(seed, "arrival", order["stage"], order["round"], order["participant"])


@dataclass(frozen=True)
class Surroundings:
    """What all devices of a simulation have in common."""

    topics: Topics
    data: str  # where images come from
    hello: Hello
    lender: BlobStore  # the server's model
    folder: Path
    drops: Callable[[int, int, int], bool]  # (stage, round, participant)
    pool: Pool
    post: Post
    tell: Callable[[str, Tell], None]


class SimulatedDevice:
    """`kept` is what `keep` gave when the simulation was stopped."""

    def __init__(self, number: int, around: Surroundings, transport: MemoryTransport, kept: Mapping[str, Any] | None, now: float) -> None:
        self.name = f"device-{number}"
        self._around, self._transport = around, transport
        kept = kept or {"facts": {}, "held": [], "dropped": None}
        self._dropped: list[int] | None = kept["dropped"]  # [stage, round]; asked for it once more, the device is back
        identity = Identity(device=self.name, boot=BOOT - 1)  # which opening the journal counts up
        self._facts = MemoryFacts({**kept["facts"], "device": identity.model_dump_json()})
        self._blobs = BorrowedBlobs(around.lender, kept["held"])
        journal = Journal(self._facts)
        folder = around.folder / self.name
        places = Places(around.data, kept=folder / "images", out=folder / "update.safetensors", shared=True)
        spool = BlobStore(folder / "updates", durable=False)
        work = Work(self.name, around.topics, journal, self._blobs, spool, places, transport)
        self._session = Session(around.topics, around.hello, journal, work, transport, FIRST_CONNECTION_S, now)

    def open(self, take: Callable[[Event], None], now: float) -> None:
        """Connect; `take` gets the transport's events."""
        topics = self._around.topics
        for filter in topics.for_device(self.name):
            self._transport.subscribe(filter)
        will = Will(topics.from_device(self.name, "state"), encode(State(state="lost", boot=BOOT)))
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

    def keep(self, now: float) -> dict[str, Any]:
        """All that the device has to remember, for JSON."""
        self._session.handle(Stop(), now)  # an agent that ends writes down what it has counted; what it wants done then is not done
        return {"facts": self._facts.held, "held": sorted(self._blobs.held), "dropped": self._dropped}

    def _execute(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case StartWorker():
                    self._around.pool.greet(self)
                case Train(order, sample_s):
                    self._train(order, sample_s)
                case EndWorker():
                    self._around.pool.cancel(self)
                case Tell():
                    self._around.tell(self.name, effect)
                case Show():
                    pass
                case Exit(error):
                    raise error or LwfedError(f"{self.name} has ended")
                case _:
                    self._transport.execute(effect)

    def _train(self, order: Mapping[str, Any], sample_s: float) -> None:
        stage, round = order["stage"], order["round"]
        if self._dropped != [stage, round] and self._around.drops(stage, round, order["participant"]):
            self._dropped = [stage, round]
            self._around.post(self, WorkerError(DROPPED_OUT, DROPPED))
        else:
            self._around.pool.submit(self, order, sample_s)
