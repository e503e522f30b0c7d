"""The server publishes blobs to all devices that lack them: the union of what they need, once.

    idle --a need--> gathering (0.3 s, for others to join) --> sending, lowest chunk first --nothing left--> idle

Nobody acknowledges chunks. The only sign of loss is a device that asks again for chunks that went out after its last
question; then brokers or links are overrun and the pace is halved, to recover slowly. What waits in the broker while it sends
a chunk to everybody else looks like loss to a device, so with many who ask the pace is that of the broker's own link.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lwfed.blobs import BlobStore
from lwfed.errors import InvalidMessage
from lwfed.wire.commands import Command, Send
from lwfed.wire.messages import Manifest, Need, Want, encode, indices
from lwfed.wire.topics import Topics

GATHER_S = 0.3
FASTEST = 400.0  # chunks a second: 48 MB/s at 120 KiB
SLOWEST = 4.0
FANNED_OUT = 100e6  # bytes a second that the broker is to send to all who asked together: what a gigabit link carries
BURST = 8.0  # chunks that may go out at once after a pause
RECOVERY = 0.1  # the pace grows by a tenth in each second of sending
HALVE_EVERY_S = 1.0  # one overrun makes many devices ask: it counts once
FORGET_S = 30.0  # a question repeated later than this after the last chunk says nothing about the pace


@dataclass
class _Flight:
    """One blob that is being sent."""

    queue: set[int] = field(default_factory=set)
    order: int = 0  # how many chunks of it have been sent
    sent: dict[int, int] = field(default_factory=dict)  # chunk -> `order` when it was last sent
    asked: dict[str, int] = field(default_factory=dict)  # device -> `order` when it last asked
    last_s: float = 0.0


class Broadcast:
    """Serves whatever `store` holds, in chunks of `chunk_bytes`: keep no device's update in the same store."""

    def __init__(self, topics: Topics, store: BlobStore, chunk_bytes: int) -> None:
        self.sent_chunks = 0
        self.pace = FASTEST  # chunks a second
        self._topics = topics
        self._store = store
        self._chunk_bytes = chunk_bytes
        self._flights: dict[str, _Flight] = {}  # in the order in which blobs were first asked for
        self._start: float | None = None  # when gathering ends; None: nothing to send
        self._free_at = float("-inf")  # when the pace has caught up with what was sent
        self._polled: float | None = None  # the last poll that could send
        self._halved = float("-inf")
        self._blocked = False  # the last poll ended for want of room

    def need(self, device: str, need: Need, now: float) -> list[Command]:
        """Note what `device` lacks; manifests are answered at once, unknown blobs not at all."""
        self._forget_old(now)
        idle = self._start is None
        answers: list[Command] = []
        for want in need.blobs:
            if not self._store.has(want.id):
                continue
            manifest = self._store.manifest(want.id, self._chunk_bytes)
            if not self._queue(device, want, manifest, now):
                answers.append(Send(self._topics.to_device(device, "manifest"), encode(manifest)))
        if idle and any(flight.queue for flight in self._flights.values()):
            self._start = now + GATHER_S
        return answers

    def poll(self, now: float, room: int) -> list[Command]:
        """At most `room` chunks, as many as the pace allows."""
        if self._start is None or now < self._start:
            return []
        commands: list[Command] = []
        while now >= self._opens_at() and len(commands) < room and (following := self._following()):
            command, seconds = self._send(*following, now), 1 / self.pace
            fan_out = len(self._flights[following[0]].asked) * len(command.payload)
            commands.append(command)
            self._free_at = max(self._free_at, now) + max(seconds, fan_out / FANNED_OUT)
        self._speed_up(now)
        if self._following() is None:
            self._start = None
        self._blocked = self._start is not None and len(commands) >= room
        return commands

    def next_wakeup(self, now: float) -> float | None:
        """None while idle, and while the transport has no room: then its next event is the time to poll."""
        if self._start is None or self._blocked:
            return None
        return max(now, self._start, self._opens_at())

    def _opens_at(self) -> float:
        """When the pace allows the next chunk."""
        return self._free_at - (BURST - 1) / self.pace

    def _queue(self, device: str, want: Want, manifest: Manifest, now: float) -> bool:
        """Whether the wanted chunks could be queued; otherwise the device must see the manifest (again)."""
        if want.missing is None:
            return False
        try:
            wanted = indices(want.missing, len(manifest.digests))
        except InvalidMessage:
            return False
        flight = self._flights.setdefault(want.id, _Flight(last_s=now))
        before = flight.asked.get(device)
        if before is not None and any(flight.sent.get(index, 0) > before for index in wanted):
            self._slow_down(now)
        flight.asked[device] = flight.order
        flight.queue.update(wanted)
        return True

    def _following(self) -> tuple[str, int] | None:
        for id, flight in self._flights.items():
            if flight.queue:
                if self._store.has(id):
                    return id, min(flight.queue)
                flight.queue.clear()
        return None

    def _send(self, id: str, index: int, now: float) -> Send:
        flight = self._flights[id]
        flight.queue.discard(index)
        flight.order += 1
        flight.sent[index] = flight.order
        flight.last_s = now
        self.sent_chunks += 1
        return Send(self._topics.blob_chunk(id, index), self._store.chunk(self._store.manifest(id, self._chunk_bytes), index))

    def _speed_up(self, now: float) -> None:
        if self._polled is not None:
            self.pace = min(self.pace * (1 + RECOVERY * min(max(now - self._polled, 0.0), 1.0)), FASTEST)
        self._polled = now

    def _slow_down(self, now: float) -> None:
        if now - self._halved >= HALVE_EVERY_S:
            self._halved = now
            self.pace = max(self.pace / 2, SLOWEST)

    def _forget_old(self, now: float) -> None:
        for id in [id for id, flight in self._flights.items() if not flight.queue and now - flight.last_s > FORGET_S]:
            del self._flights[id]
