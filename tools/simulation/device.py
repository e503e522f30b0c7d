"""A device of a simulation with real training: what it is made of, and what it keeps while the simulation is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwfed.blobs import BlobStore
from lwfed.edge_agent.events import Stop, Tell, WorkerError
from lwfed.edge_agent.facts import MemoryFacts
from lwfed.edge_agent.journal import Identity, Journal
from lwfed.edge_agent.work import Places
from lwfed.seeds import derive
from lwfed.tools.simulation.holdings import BorrowedBlobs
from lwfed.tools.simulation.pool import Pool, Post
from lwfed.tools.simulation.virtual import VirtualDevice
from lwfed.transport.memory import MemoryTransport
from lwfed.wire.messages import Hello, Start, Task
from lwfed.wire.topics import Topics

START = Start(boot=1, nonce=16 * "0")  # always: with the simulation the server is stopped and started, and what devices do goes on
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


class SimulatedDevice(VirtualDevice):
    """`kept` is what `keep` gave when the simulation was stopped; `taken` what the server has of it by then, in order."""

    def __init__(
        self, name: str, around: Surroundings, transport: MemoryTransport, kept: Mapping[str, Any] | None, taken: Iterable[Task], now: float
    ) -> None:
        self._around = around
        kept = kept or {"facts": {}, "held": [], "dropped": None}
        self._dropped: list[int] | None = kept["dropped"]  # [stage, round]; asked for it once more, the device is back
        identity = Identity(device=name, boot=START.boot - 1)  # which opening the journal counts up
        self._facts = MemoryFacts({**kept["facts"], "device": identity.model_dump_json()})
        self._blobs = BorrowedBlobs(around.lender, kept["held"])
        folder = around.folder / name
        places = Places(around.data, kept=folder / "images", out=folder / "update.safetensors", shared=True)
        spool = BlobStore(folder / "updates", durable=False)
        journal = Journal(self._facts)
        for task in taken:
            journal.take(task)
        super().__init__(around.topics, around.hello, journal, self._blobs, spool, places, transport, now)

    def keep(self, now: float) -> dict[str, Any]:
        """All that the device has to remember, for JSON."""
        self._session.handle(Stop(), now)  # an agent that ends writes down what it has counted; what it wants done then is not done
        return {"facts": self._facts.held, "held": sorted(self._blobs.held), "dropped": self._dropped}

    def _start_worker(self) -> None:
        self._around.pool.greet(self)

    def _end_worker(self) -> None:
        self._around.pool.cancel(self)

    def _tell(self, line: Tell) -> None:
        self._around.tell(self.name, line)

    def _train(self, order: Mapping[str, Any], sample_s: float) -> None:
        stage, round = order["stage"], order["round"]
        if self._dropped != [stage, round] and self._around.drops(stage, round, order["participant"]):
            self._dropped = [stage, round]
            self._around.post(self, WorkerError(DROPPED_OUT, DROPPED))
        else:
            self._around.pool.submit(self, order, sample_s)
