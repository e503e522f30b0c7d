"""The server takes updates from devices, a few at a time, each into a file of its own, also where two devices send the same.

    offer --no slot free--> waiting --slot free--> granted --fin, all there--> checking --accept--> forgotten
    granted --nothing new for 10 s while others wait--> left: offered anew by the device, and resumed from its part file

Brokers drop what they queue for a slow reader, after acknowledging it; so slots times window stays far below any
broker's queue. The shell looks into a `ReceivedUpdate`, takes its file over, records it, and then calls `accept`: only that sends
`done`. Or it calls `refuse`, which deletes the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lwfed.blobs import BlobStore, PartFile
from lwfed.errors import InvalidPayload
from lwfed.wire.commands import Command, Send
from lwfed.wire.messages import KINDS, Done, Fin, Grant, Message, Miss, Offer, Refuse, RefuseCode, Wait, encode
from lwfed.wire.ranges import ranges
from lwfed.wire.report import Traffic
from lwfed.wire.topics import Topics, UpdateChunk
from lwfed.wire.upload import contribution_id

SILENCE_S = 10.0
WAIT_S = 30.0  # a device asks again then, in case its grant was lost
CHECKING_S = 5.0
TELL_EVERY_S = 1.0  # more chunks than one are on their way when a device learns that it has no slot


@dataclass(frozen=True)
class ReceivedUpdate:
    """A complete update on disk, its digest verified; its content is not. The file is whoever's takes it, until `refuse`."""

    device: str
    offer: Offer
    path: Path
    traffic: Traffic


@dataclass(frozen=True)
class _Offered:
    """It waits for a slot."""

    device: str
    offer: Offer


@dataclass
class _Transfer:
    """It has a slot, or had one."""

    device: str
    offer: Offer
    part: PartFile
    moved_s: float  # when it got its slot, or the last chunk that was not there


class Inbox:
    """All uploads of one server. `known` says whether a contribution is recorded; `limit_bytes` bounds an update's size."""

    def __init__(
        self,
        topics: Topics,
        store: BlobStore,
        limit_bytes: int,
        known: Callable[[str], bool],
        slots: int = 8,
        window: int = 4,
        worker: str = "w0",
    ) -> None:
        self.limit_bytes = limit_bytes
        self.bad_chunks = 0
        self._topics = topics
        self._store = store
        self._known = known
        self._slots = slots
        self._window = window
        self._worker = worker
        self._granted: dict[str, _Transfer] = {}  # by contribution
        self._waiting: dict[str, _Offered] = {}  # first come, first served
        self._checking: dict[str, _Transfer] = {}
        self._left: dict[str, _Transfer] = {}  # lost their slot, and keep what has arrived
        self._told: dict[str, float] = {}  # when a device without a slot was last told so

    def offer(self, device: str, offer: Offer, now: float) -> list[Command]:
        """Answer an offer that the shell finds timely: grant, wait, done, or refuse."""
        contribution = offer.contribution
        if contribution != contribution_id(offer.run, offer.stage, offer.round, device, offer.manifest.blob.id):
            return self.refuse(device, contribution, "identity", "the contribution's id is not that of its device, round and content")
        if self._known(contribution):  # perhaps of an earlier stage, whose updates were larger
            return [self._tell(device, Done(contribution=contribution))]
        if offer.manifest.blob.size > self.limit_bytes:
            reason = f"{offer.manifest.blob.size} bytes; an update of this stage has at most {self.limit_bytes}"
            return self.refuse(device, contribution, "too_large", reason)
        if contribution in self._checking:
            return [self._tell(device, Wait(contribution=contribution, retry_s=CHECKING_S))]
        self._drop_others(device, contribution)
        known = self._granted.get(contribution)
        if known is not None and known.offer.manifest == offer.manifest:
            return [self._grant(known)]
        left = self._granted.pop(contribution, None) or self._left.get(contribution)
        if left is not None and left.offer.manifest != offer.manifest:
            self._left.pop(contribution, None)
            left.part.discard()
        self._waiting[contribution] = _Offered(device, offer)  # in the place that it had, if it waits already
        granted = self._fill(now)
        if contribution in self._waiting:
            granted.append(self._tell(device, Wait(contribution=contribution, retry_s=WAIT_S)))
        return granted

    def chunk(self, topic: UpdateChunk, data: bytes, now: float) -> list[Command]:
        """Keep a chunk of a granted update, also one that was on its way when the slot was lost: over the slowest link something is gained.

        Anything else is dropped, and asked for again after `fin`.
        """
        transfer = self._granted.get(topic.contribution) or self._left.get(topic.contribution)
        if transfer is None or transfer.device != topic.device or topic.worker != self._worker:
            return self._stop_stray(topic, now)
        try:
            if transfer.part.write(topic.index, data):
                transfer.moved_s = now
        except InvalidPayload:
            self.bad_chunks += 1
        return [] if topic.contribution in self._granted else self._stop_stray(topic, now)

    def expects(self, device: str, fin: Fin) -> bool:
        """Whether what it ends has a slot, or is recorded already, so that the device only lacks an answer."""
        transfer = self._granted.get(fin.contribution)
        return (transfer is not None and transfer.device == device) or self._known(fin.contribution)

    def fin(self, device: str, fin: Fin, now: float) -> tuple[list[Command], ReceivedUpdate | None]:
        """The device has sent everything: ask for what is missing, or hand the update to the shell."""
        contribution = fin.contribution
        transfer = self._granted.get(contribution)
        if transfer is None or transfer.device != device:
            return self._fin_without_slot(device, contribution), None
        if not transfer.part.complete:
            return [self._tell(device, Miss(contribution=contribution, missing=ranges(transfer.part.missing())))], None
        del self._granted[contribution]
        try:
            path = transfer.part.verify()
        except InvalidPayload as error:
            return [*self.refuse(device, contribution, "digest", str(error)), *self._fill(now)], None
        self._checking[contribution] = transfer
        return self._fill(now), ReceivedUpdate(device, transfer.offer, path, fin.traffic)

    def accept(self, contribution: str) -> list[Command]:
        """The update is recorded: its device may forget it. Raises KeyError for one that was not received."""
        transfer = self._checking.pop(contribution)
        return [self._tell(transfer.device, Done(contribution=contribution))]

    def refuse(self, device: str, contribution: str | None, code: RefuseCode, reason: str) -> list[Command]:
        """Refuse an offer or a received update, and forget what belongs to it."""
        for table in (self._granted, self._checking, self._left):
            if contribution in table and table[contribution].device == device:
                table.pop(contribution).part.discard()
        if contribution in self._waiting and self._waiting[contribution].device == device:
            del self._waiting[contribution]
        return [self._tell(device, Refuse(contribution=contribution, code=code, reason=reason[:1000]))]

    def clear(self, code: RefuseCode, reason: str) -> list[Command]:
        """Refuse everything that is under way, at the end of a round, and forget the parts."""
        for id in list(self._left):
            self._left.pop(id).part.discard()
        self._told.clear()
        granted = [(transfer.device, id) for id, transfer in self._granted.items()]
        waiting = [(offered.device, id) for id, offered in self._waiting.items()]
        return [command for device, id in granted + waiting for command in self.refuse(device, id, code, reason)]

    def poll(self, now: float) -> list[Command]:
        """Give the slots of devices that get nowhere to those that wait. Call it when all that has come was handed over:
        of a device that seems silent something may be among it."""
        for contribution, transfer in list(self._granted.items()):
            excess = len(self._granted) + len(self._waiting) - self._slots
            if excess > 0 and self._waiting and now >= transfer.moved_s + SILENCE_S:
                self._left[contribution] = self._granted.pop(contribution)
        return self._fill(now)

    def next_wakeup(self, now: float) -> float | None:
        """When the next slot falls to a waiting device; None while nobody waits."""
        if not self._waiting or not self._granted:
            return None
        return max(now, min(transfer.moved_s for transfer in self._granted.values()) + SILENCE_S)

    def _fill(self, now: float) -> list[Command]:
        """Give free slots to those that wait."""
        commands: list[Command] = []
        while self._waiting and len(self._granted) < self._slots:
            contribution, offered = next(iter(self._waiting.items()))
            del self._waiting[contribution]
            left = self._left.pop(contribution, None)
            part = left.part if left else self._store.part(offered.offer.manifest, contribution)
            transfer = _Transfer(offered.device, offered.offer, part, now)
            self._granted[contribution] = transfer
            commands.append(self._grant(transfer))
        return commands

    def _fin_without_slot(self, device: str, contribution: str) -> list[Command]:
        if self._known(contribution):
            return [self._tell(device, Done(contribution=contribution))]
        if contribution in self._checking:
            return []
        # We were restarted, or its slot was given away: it must offer again.
        retry_s = WAIT_S if contribution in self._waiting else 0
        return [self._tell(device, Wait(contribution=contribution, retry_s=retry_s))]

    def _stop_stray(self, topic: UpdateChunk, now: float) -> list[Command]:
        """A device sends without a slot, since we were restarted or it was given away: what it sends is wasted."""
        if topic.contribution in self._checking or now < self._told.get(topic.device, float("-inf")) + TELL_EVERY_S:
            return []
        self._told[topic.device] = now
        return self._fin_without_slot(topic.device, topic.contribution)

    def _drop_others(self, device: str, contribution: str) -> None:
        """A device has one update at a time, so that no device can fill the disk with parts."""
        for table in (self._granted, self._left):
            for id in [id for id, transfer in table.items() if transfer.device == device and id != contribution]:
                table.pop(id).part.discard()
        for id in [id for id, offered in self._waiting.items() if offered.device == device and id != contribution]:
            del self._waiting[id]

    def _grant(self, transfer: _Transfer) -> Send:
        missing = ranges(transfer.part.missing())
        grant = Grant(contribution=transfer.offer.contribution, worker=self._worker, missing=missing, window=self._window)
        return self._tell(transfer.device, grant)

    def _tell(self, device: str, message: Message) -> Send:
        return Send(self._topics.to_device(device, KINDS[type(message)]), encode(message))
