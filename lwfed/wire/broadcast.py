"""The server publishes blobs to all devices that lack them: the union of what they need, once.

    idle --a need--> gathering (0.3 s, for others to join) --> sending, lowest chunk first --nothing left--> idle

Who needs a blob gets all that is published of it. So a chunk that only a half of them or fewer still lack, since their
links broke or they came late, goes to each of these alone: on a slow link what others have lost would keep a device from its own.

Nobody says which chunks have come. The only sign of loss is a device that asks again for chunks that went out after its last
question; then its broker's queue or its link is overrun, and its own pace is halved, to recover slowly. A chunk goes out at
the pace of the fastest device that lacks it, and what only slowed ones lack behind all else. So one that asks again and again
costs the others little, and a broker that loses what it sends to everybody is sent less.

A broker takes whatever it is given, and keeps it for those who are slower. So devices say how many have come, and no more
goes out while it holds much for all of them together; but a quarter that keeps up does not wait for the others. Who is silent
is not waited for until it speaks again: it may be gone. While all are silent they are slow, and nothing goes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lwfed.blobs import BlobStore
from lwfed.errors import InvalidMessage, StateError
from lwfed.wire.commands import Command, Send
from lwfed.wire.messages import Manifest, Need, Want, encode
from lwfed.wire.ranges import indices
from lwfed.wire.topics import Topics

GATHER_S = 0.3
FASTEST = 400.0  # chunks a second: 48 MB/s at 120 KiB
SLOWEST = 4.0
HELD_BYTES = 512e6  # that the broker is to keep for all who lack chunks
HELD_EACH = 20  # chunks of that for one of them: what follows waits in one copy for all (`max_inflight_messages` of mosquitto)
FEW = 4  # chunks on their way: who has fewer keeps up, and reports half as many together
KEEPING_UP = 0.25  # of all: so many do not wait
SILENT_S = 10.0
LOOK_S = 2.0  # how often is looked for silent ones
BURST = 8.0  # chunks that may go out at once after a pause
RECOVERY = 0.1  # the pace grows by a tenth in each second of sending at it
FORGET_S = 30.0  # a question repeated later than this after the last chunk says nothing about the pace


@dataclass
class _Asker:
    """A device, as far as chunks are concerned."""

    id: str
    wants: dict[str, int] = field(default_factory=dict)  # blob -> a bit for each chunk that it is still to be sent
    had: dict[str, int] = field(default_factory=dict)  # blob -> a bit for each chunk that it was sent since it last asked for some of it
    pace: float = FASTEST  # chunks a second
    ready_s: float = float("-inf")  # when its pace allows the next one
    last_s: float = 0.0  # its last question, or chunk
    away: int = 0  # chunks that went out to it since it last asked for some, of which it has not said that they came
    heard_s: float = 0.0  # when it last said so, or none was away
    silent: bool = False

    def is_past(self, now: float) -> bool:
        return not self.wants and now - self.last_s > FORGET_S

    def lacks(self, id: str, index: int) -> bool:
        return bool(self.wants.get(id, 0) >> index & 1)

    def listens(self, id: str) -> bool:
        """Whether it gets what is published of the blob to all, as far as is known."""
        return id in self.wants or (id in self.had and self.away > 0)

    def slow_down(self) -> None:
        self.pace = max(self.pace / 2, SLOWEST)

    def sent(self, id: str, index: int, now: float) -> None:
        """A chunk of a blob that it wants has gone out to it, on its account or not."""
        self.last_s = now
        self.heard_s = self.heard_s if self.away else now
        self.away += 1
        self.had[id] |= 1 << index
        bits = self.wants.pop(id)
        if bits >> index & 1 and now >= self.ready_s:
            self.pace = min(self.pace + RECOVERY, FASTEST)  # 1 / pace seconds later
            self.ready_s = now + 1 / self.pace
        if left := bits & ~(1 << index):
            self.wants[id] = left


@dataclass
class _Sums:
    """Over all who want chunks; kept, since every report asks for them."""

    wanting: int = 0
    fast: int = 0
    speaking: int = 0  # those who are not silent
    held: int = 0  # chunks of which the broker has copies, also for silent ones
    keeping_up: int = 0  # of those who speak

    def add(self, asker: _Asker, sign: int) -> None:
        if asker.wants:
            self.wanting += sign
            self.fast += sign * (asker.pace == FASTEST)
            self.held += sign * min(asker.away, HELD_EACH)
        if asker.wants and not asker.silent:
            self.speaking += sign
            self.keeping_up += sign * (asker.away < FEW)


class Broadcast:
    """Serves whatever `store` holds, in chunks of `chunk_bytes`: keep no device's update in the same store."""

    def __init__(self, topics: Topics, store: BlobStore, chunk_bytes: int) -> None:
        self.sent_chunks = 0
        self._topics = topics
        self._store = store
        self._chunk_bytes = chunk_bytes
        self._manifests: dict[tuple[str, str], None] = {}  # (device, blob) that are to be answered with the manifest
        self._askers: dict[str, _Asker] = {}
        self._order: dict[str, None] = {}  # blobs as they were first asked for
        self._start: float | None = None  # when gathering ends; None: no chunk to send
        self._free_at = float("-inf")  # when all that was sent would have gone at the fastest pace
        self._blocked = False  # the last poll ended for want of room
        self._sums = _Sums()
        self._damaged = False
        self._look_at = float("-inf")  # when to look for silent ones again, if the broker holds much

    def need(self, device: str, need: Need, now: float) -> None:
        """Note what `device` lacks; unknown blobs are not answered at all."""
        if self._start is None:
            self._forget_old(now)
        lost = [self._note(device, want, now) for want in need.blobs if self._store.has(want.id)]
        if any(lost):
            with self._changing(self._askers[device]) as asker:
                asker.slow_down()
        if self._start is None and self._sums.wanting:
            self._start = now + GATHER_S

    def got(self, device: str, chunks: int, now: float) -> None:
        """So many have come to `device` since it last said so."""
        if known := self._askers.get(device):
            with self._changing(known) as asker:
                asker.away, asker.heard_s, asker.silent = max(0, asker.away - chunks), now, False

    def poll(self, now: float, room: int) -> list[Command]:
        """At most `room` messages: manifests at once, then as many chunks as the pace and what the broker holds allow."""
        commands = self._answers(room)
        if self._start is not None and now >= self._start:
            self._note_silent(now)
            while not self._is_full() and now >= self._opens_at() and len(commands) < room and (following := self._following(now)):
                commands += self._send(*following, now)
            if not self._sums.wanting:
                self._start = None
        self._blocked = len(commands) >= room and (bool(self._manifests) or self._start is not None)
        return commands

    def take_damage(self) -> bool:
        """Whether a blob has rotted since the last call: the store has it no more, and it is not sent."""
        damaged, self._damaged = self._damaged, False
        return damaged

    def next_wakeup(self, now: float) -> float | None:
        """None while idle, and while the transport has no room: then its next event is the time to poll."""
        if self._blocked or (self._start is None and not self._manifests):
            return None
        if self._start is None or self._manifests:
            return now
        if self._is_full():
            return max(now, self._start, self._look_at)
        ready = now if self._sums.fast else min((asker.ready_s for asker in self._wanting()), default=now)
        return max(now, self._start, self._opens_at(), ready)

    def _opens_at(self) -> float:
        """When the pace of all together allows the next chunk."""
        return self._free_at - (BURST - 1) / FASTEST

    def _is_full(self) -> bool:
        """The broker holds much, and few keep up."""
        sums = self._sums
        return sums.held >= HELD_BYTES / self._chunk_bytes and sums.keeping_up < max(1, KEEPING_UP * sums.speaking)

    def _note_silent(self, now: float) -> None:
        if self._is_full() and now >= self._look_at:
            self._look_at = now + LOOK_S
            for known in self._wanting():
                if known.away and now - known.heard_s >= SILENT_S:
                    with self._changing(known) as asker:
                        asker.silent = True

    @contextmanager
    def _changing(self, asker: _Asker) -> Iterator[_Asker]:
        self._sums.add(asker, -1)
        yield asker
        self._sums.add(asker, 1)

    def _note(self, device: str, want: Want, now: float) -> bool:
        """Queue the wanted chunks, or the manifest; whether chunks are among them that were lost."""
        wanted = self._wanted(want)
        if wanted is None:
            self._manifests[device, want.id] = None
            return False
        asker = self._askers.get(device)
        if asker is None or asker.is_past(now):
            asker = self._askers[device] = _Asker(device)
        self._order[want.id] = None
        bits, had = sum(1 << index for index in wanted), asker.had.get(want.id, 0)
        with self._changing(asker):
            asker.had[want.id], asker.last_s = 0, now
            asker.away = 0  # counted too little they do no harm; too much, and what no report will ever tell of is waited for
            asker.silent = False
            asker.wants.pop(want.id, None)
            if bits:
                asker.wants[want.id] = bits
        return bool(bits & had)

    def _wanted(self, want: Want) -> list[int] | None:
        """None when the device must see the manifest (again)."""
        if want.missing is None:
            return None
        try:
            manifest = self._manifest(want.id)
            return indices(want.missing, len(manifest.digests)) if manifest else None
        except InvalidMessage:
            return None

    def _wanting(self) -> list[_Asker]:
        return [asker for asker in self._askers.values() if asker.wants]

    def _following(self, now: float) -> tuple[str, int, str | None] | None:
        """Blob, chunk, and the device to which alone it goes."""
        wanting = self._wanting()
        fast = [asker for asker in wanting if asker.pace == FASTEST]
        for askers in (fast, [asker for asker in wanting if asker.ready_s <= now]):
            for id in self._order:
                bits = 0
                for asker in askers:
                    bits |= asker.wants.get(id, 0)
                if bits and self._store.has(id):
                    index = (bits & -bits).bit_length() - 1
                    few = 2 * sum(one.lacks(id, index) for one in wanting) <= sum(one.listens(id) for one in self._askers.values())
                    return id, index, next(one.id for one in askers if one.lacks(id, index)) if few else None
                if bits:
                    self._withdraw(id)
        return None

    def _withdraw(self, id: str) -> None:
        for known in self._askers.values():
            with self._changing(known) as asker:
                asker.wants.pop(id, None)

    def _answers(self, room: int) -> list[Command]:
        answers: list[Command] = []
        while self._manifests and len(answers) < room:
            device, id = next(iter(self._manifests))
            del self._manifests[device, id]
            if self._store.has(id) and (manifest := self._manifest(id)):
                answers.append(Send(self._topics.to_device(device, "manifest"), encode(manifest)))
        return answers

    def _manifest(self, id: str) -> Manifest | None:
        """None where the blob has rotted."""
        with self._noting_damage(id):
            return self._store.manifest(id, self._chunk_bytes)
        return None

    @contextmanager
    def _noting_damage(self, id: str) -> Iterator[None]:
        """Reading the blob, which is not in the store any more when it has rotted; errors of the disk are raised."""
        try:
            yield
        except StateError:
            if self._store.has(id):
                raise
            self._damaged = True

    def _send(self, id: str, index: int, device: str | None, now: float) -> list[Command]:
        """Nothing of a blob that has rotted: the store has it no more."""
        chunk: bytes | None = None
        with self._noting_damage(id):
            chunk = self._store.chunk(self._store.manifest(id, self._chunk_bytes), index)
        if chunk is None:
            return []
        self.sent_chunks += 1
        for known in [one for one in self._wanting() if id in one.wants] if device is None else [self._askers[device]]:
            with self._changing(known) as asker:
                asker.sent(id, index, now)
        self._free_at = max(self._free_at, now) + 1 / FASTEST
        return [Send(self._topics.blob_chunk(id, index, device), chunk)]

    def _forget_old(self, now: float) -> None:
        self._askers = {device: asker for device, asker in self._askers.items() if not asker.is_past(now)}
        held = {id for id in self._order if self._store.has(id)}
        for asker in self._askers.values():
            asker.had = {id: bits for id, bits in asker.had.items() if id in asker.wants or id in held}
        known = {id for asker in self._askers.values() for id in asker.had}
        self._order = {id: None for id in self._order if id in known}
