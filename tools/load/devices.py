"""Many devices in one process, for a load test: ``python -m lwfed.tools.load.devices URL COUNT ROUNDS FOLDER --json``

Each is the session, work and journal of `edge-agent`, with a connection of its own; facts are kept in memory, the bytes of the
model once for all, though each device downloads and checks them. Training is canned and takes no time.
"""

from __future__ import annotations

import heapq
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from lwfed import descriptors
from lwfed.blobs import Arrival, BlobStore
from lwfed.console import Console, counted
from lwfed.edge_agent.events import Event, Tell, WorkerPlanned, WorkerReady
from lwfed.edge_agent.facts import MemoryFacts
from lwfed.edge_agent.journal import Identity, Journal
from lwfed.edge_agent.work import Places
from lwfed.tools.load.canned import IMAGES, Training
from lwfed.tools.load.link import Connections, PolledTransport
from lwfed.tools.simulation.holdings import BorrowedBlobs, BorrowedPart
from lwfed.tools.simulation.virtual import VirtualDevice
from lwfed.transport.address import BrokerAddress
from lwfed.wire.messages import Hello, Manifest, Start
from lwfed.wire.topics import Topics

READY = WorkerReady(torch="canned", machine="canned")
PLANNED = WorkerPlanned(prefix="torch", micro_batch=1, reason="canned", needs_mb=100.0)
LONGEST_WAIT_S = 1.0
GRACE_S = 60.0  # after the end of the run, for the last acknowledgements


class Shelf(BorrowedBlobs):
    """What a device holds of the model. Its bytes are kept by whichever device has them first."""

    def __init__(self, store: BlobStore, open_parts: dict[str, Arrival]) -> None:
        super().__init__(store)
        self._store, self._open = store, open_parts

    def part(self, manifest: Manifest) -> BorrowedPart:
        if manifest.blob.id not in self._open:
            self._open[manifest.blob.id] = self._store.part(manifest)
        return _Part(self, manifest, self._open[manifest.blob.id])


class _Part(BorrowedPart):
    def __init__(self, shelf: Shelf, manifest: Manifest, common: Arrival) -> None:
        super().__init__(shelf, manifest)
        self._common = common

    def _keep(self, index: int, data: bytes) -> None:
        if not self._common.complete:
            self._common.write(index, data)

    def _install(self) -> Path:
        self._common.commit()
        return super()._install()


@dataclass
class Tally:
    """What all devices have said."""

    accepted: int = 0
    refused: int = 0
    warnings: int = 0
    disconnections: int = 0
    update_bytes: int = 0  # of the last update
    over: bool = False  # some device knows that the run is

    @property
    def answered(self) -> int:
        return self.accepted + self.refused

    def note(self, line: Tell) -> None:
        match line.event:
            case "accepted":
                self.accepted += 1
            case "refused":
                self.refused += 1
            case "warning":
                self.warnings += 1
            case "disconnected":
                self.disconnections += 1
            case "update":
                self.update_bytes = line.fields["bytes"]
            case "run":
                self.over |= line.fields.get("phase") in ("finished", "stopped")


class LoadDevice(VirtualDevice):
    def __init__(self, number: int, fleet: Fleet, now: float) -> None:
        self.transport = PolledTransport(fleet.connections, fleet.address)
        self._fleet, self._worker = fleet, 0
        journal = Journal(MemoryFacts({"device": Identity(device=f"load-{number}", boot=0).model_dump_json()}))
        self._shelf = Shelf(fleet.model, fleet.open_parts)
        places = Places("canned", kept=fleet.folder / "images", out=fleet.folder / f"{number}.safetensors")
        start = Start(boot=journal.boot, nonce=f"{number:016x}")
        hello = Hello(
            start=start, lwfed="0", python="3", torch="canned", machine="canned", cores=1, memory_mb=1000, images=IMAGES, source="folder"
        )
        super().__init__(Topics("default"), hello, journal, self._shelf, fleet.spool, places, self.transport, now)

    def take(self, event: Event, now: float) -> None:
        super().take(event, now)
        self._fleet.wake(self)

    def poll(self, now: float) -> None:
        super().poll(now)
        self._fleet.wake(self)

    def _start_worker(self) -> None:
        self._worker += 1
        self._soon(READY)

    def _end_worker(self) -> None:
        self._worker += 1

    def _train(self, order: Mapping[str, Any], sample_s: float) -> None:
        self._shelf.held |= self._fleet.training.received(order)
        self._soon(PLANNED)
        self._soon(self._fleet.training.train(order))

    def _tell(self, line: Tell) -> None:
        self._fleet.tally.note(line)

    def _soon(self, event: Event) -> None:
        worker = self._worker

        def unless_ended() -> None:
            if worker == self._worker:
                self.take(event, time.monotonic())

        self._fleet.soon(unless_ended)


class Fleet:
    def __init__(self, address: BrokerAddress, folder: Path) -> None:
        self.address, self.folder = address, folder
        self.connections, self.tally = Connections(), Tally()
        self.model, self.spool = BlobStore(folder / "model", durable=False), BlobStore(folder / "updates", durable=False)
        self.open_parts: dict[str, Arrival] = {}  # blob -> what of it some device has
        self.training = Training(self.model)
        self._actions: deque[Callable[[], None]] = deque()
        self._due: dict[LoadDevice, float] = {}
        self._agenda: list[tuple[float, int, LoadDevice]] = []
        self._ticket = count()

    def run(self, devices: int, rounds: int) -> None:
        """Until every device has an answer to so many updates, or the run has been over for a while."""
        for number in range(devices):
            device = LoadDevice(number, self, time.monotonic())
            device.open(partial(self._on, device))
        give_up_at = float("inf")
        while self.tally.answered < devices * rounds and time.monotonic() < give_up_at:
            self._step()
            if self.tally.over and give_up_at == float("inf"):
                give_up_at = time.monotonic() + GRACE_S
        self.connections.close()

    def soon(self, action: Callable[[], None]) -> None:
        self._actions.append(action)

    def wake(self, device: LoadDevice) -> None:
        """When it wants to be polled, from now on."""
        when = device.next_wakeup(time.monotonic())
        if when is None:
            self._due.pop(device, None)
        elif self._due.get(device) != when:
            self._due[device] = when
            heapq.heappush(self._agenda, (when, next(self._ticket), device))

    def _on(self, device: LoadDevice, event: Event) -> None:
        """Within a transport, which may only be used again when it is through."""
        self.soon(lambda: device.take(event, time.monotonic()))

    def _step(self) -> None:
        now = time.monotonic()
        while self._agenda and self._agenda[0][0] <= now:
            when, _, device = heapq.heappop(self._agenda)
            if self._due.get(device) == when:
                del self._due[device]
                device.poll(now)
        wait_s = self._agenda[0][0] - now if self._agenda else LONGEST_WAIT_S
        self.connections.poll(0.0 if self._actions else min(wait_s, LONGEST_WAIT_S))
        while self._actions:
            self._actions.popleft()()


def main() -> None:
    url, devices, rounds, folder = sys.argv[1:5]
    descriptors.raise_limit()
    fleet = Fleet(BrokerAddress.parse(url), Path(folder))
    fleet.run(int(devices), int(rounds))
    Console(as_json=True).say("devices", f"{counted(fleet.tally.accepted, 'update')} accepted", **asdict(fleet.tally))


if __name__ == "__main__":
    main()
