"""A device fetches blobs: manifest, subscription, chunks, until each is in its store.

    unknown --manifest--> gathering --all chunks--> held
    gathering --its chunks contradict the manifest--> unknown

Chunks are published once for everybody who asked, in the server's order and pace, and any may be lost. So the device
only ever says what it still lacks. Silence is no sign of loss: on a slow link a chunk takes seconds, with others behind it
in the broker's queue, and all would come twice. So after a silence the device asks for the manifest, whose answer comes
behind them, and then for what is missing still. Chunks may come in any order, twice, damaged, or without being wanted.
A connection over which nothing comes is made anew, which loses all that is on its way to us; each time it gets twice the
patience, until a chunk fits into it. The device says how many have come, so that the broker is not given more than it gets rid
of, and others' chunks do not come to who has all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Literal

from lwfed.blobs import Arrival, Holdings
from lwfed.errors import InvalidPayload
from lwfed.wire.commands import Command, Reconnect, Send, Subscribe, Unsubscribe
from lwfed.wire.messages import BlobRef, Got, Manifest, Need, Want, encode
from lwfed.wire.ranges import ranges
from lwfed.wire.retry import LONGEST_PATIENCE_S, SUSPECT_S, Retry
from lwfed.wire.topics import Topics

SILENCE_S = 2.0
GATHER_S = 0.2  # manifests answer one question but arrive one by one: ask for the chunks of all of them at once
GOT = 2  # chunks that are reported together, or fewer after a while
GOT_EVERY_S, GOT_WITHIN_S = 0.25, 3.0
MAX_NEED_BLOBS = 64
MAX_NEED_BYTES = 12_000  # so that every broker takes it that takes an offer; what has no room in it is asked for next
WANT_BYTES = 96  # one without its ranges
MAX_BAD_IN_A_ROW = 3  # then the manifest itself is doubted: a restarted server may cut blobs differently


@dataclass
class _Blob:
    ref: BlobRef
    part: Arrival | None = None  # None: its manifest is unknown
    asked: Literal["nothing", "chunks", "manifest"] = "nothing"  # and not answered yet
    bad_in_a_row: int = 0


class Downloads:
    """All downloads of one device. Not polled while the connection or the server is known to be away."""

    def __init__(self, topics: Topics, device: str, store: Holdings, seed: int) -> None:
        self.bad_chunks = 0  # damaged on their way, since `want`
        self._topic, self._got_topic = topics.from_device(device, "need"), topics.from_device(device, "got")
        self._filter = topics.blob_chunks
        self._store = store
        self._wanted: dict[str, BlobRef] = {}
        self._open: dict[str, _Blob] = {}
        self._subscribed: set[str] = set()
        self._heard = False
        self._fresh = False  # a manifest came since the last question
        self._retry = Retry(Random(seed), SILENCE_S)
        self._patience_s = SUSPECT_S  # with a silent connection, learned for what is wanted
        self._got = 0  # chunks that have come and were not reported
        self._reported_s = float("-inf")
        self._report_due: float | None = None  # None: nothing to report

    @property
    def complete(self) -> bool:
        """Whether every wanted blob is in the store."""
        return not self._open

    def want(self, refs: Iterable[BlobRef]) -> None:
        """Replace what is wanted; what is held already is not fetched, what was begun goes on."""
        self.bad_chunks = 0
        self._wanted = {ref.id: ref for ref in refs}
        missing = {id: ref for id, ref in self._wanted.items() if not self._store.has(id)}
        begun = {id: blob for id, blob in self._open.items() if missing.get(id) == blob.ref}
        if missing.keys() - begun.keys():
            self._retry.now()
            self._patience_s = SUSPECT_S
        self._open = {id: begun.get(id) or _Blob(ref) for id, ref in missing.items()}

    def on_manifest(self, manifest: Manifest) -> None:
        blob = self._open.get(manifest.blob.id)
        if blob is None or manifest.blob != blob.ref:
            return
        self._heard = True
        if blob.part is None or blob.part.manifest != manifest:
            blob.part = self._store.part(manifest)
            blob.bad_in_a_row = 0
            blob.asked = "nothing"
            self._fresh = True
            self._finish(blob)
        elif blob.asked == "manifest":
            blob.asked = "nothing"
            self._fresh = True

    def on_chunk(self, blob: str, index: int, data: bytes) -> None:
        self._got += 1
        found = self._open.get(blob)
        if found is None or found.part is None:
            return
        self._heard = True
        try:
            found.part.write(index, data)
        except InvalidPayload:
            self.bad_chunks += 1
            found.bad_in_a_row += 1
            if found.bad_in_a_row >= MAX_BAD_IN_A_ROW:
                found.part = None
        else:
            found.bad_in_a_row = 0
            self._finish(found)

    def reset(self) -> None:
        """The connection or the server is back: nothing that was asked before will be answered."""
        self._heard, self._got = False, 0
        for blob in self._open.values():
            blob.asked = "nothing"
        if self._open:
            self._retry.now()

    def poll(self, now: float) -> list[Command]:
        """What to do now. Call it after every event and at `next_wakeup`."""
        commands: list[Command] = self._subscriptions()
        self._note_answers(now)
        if self._retry.is_due(now):
            if self._retry.suspect(now, self._patience_s):
                self._patience_s = min(2 * self._patience_s, LONGEST_PATIENCE_S)
                commands.append(Reconnect("the server does not answer requests for the model"))
            commands.append(Send(self._topic, encode(self._need())))
            self._retry.asked(now)
        return commands + self._report(now)

    def next_wakeup(self, now: float) -> float | None:
        times = [when for when in (self._retry.due, self._report_due) if when is not None]
        return max(min(times), now) if times else None

    def progress(self) -> tuple[int, int]:
        """Bytes held and bytes wanted."""
        parts = {id: blob.part.have_bytes if blob.part else 0 for id, blob in self._open.items()}
        return sum(parts.get(id, ref.size) for id, ref in self._wanted.items()), sum(ref.size for ref in self._wanted.values())

    def _finish(self, blob: _Blob) -> None:
        if blob.part is None or not blob.part.complete:
            return
        try:
            blob.part.commit()
            del self._open[blob.ref.id]
        except InvalidPayload:
            blob.part = None

    def _subscriptions(self) -> list[Command]:
        if not self._open and not self._subscribed:
            return []
        gathering = {id for id, blob in self._open.items() if blob.part is not None}
        left, begun = sorted(self._subscribed - self._open.keys()), sorted(gathering - self._subscribed)
        self._subscribed = (self._subscribed | gathering) & self._open.keys()
        return [*(Unsubscribe(self._filter(id)) for id in left), *(Subscribe(self._filter(id)) for id in begun)]

    def _note_answers(self, now: float) -> None:
        if not self._open:
            self._retry.stop()
        elif self._heard:
            if any(blob.asked == "manifest" for blob in self._open.values()):
                self._retry.wait_longer(now)
            else:
                self._retry.wait(now)
            if self._fresh:
                all_known = all(blob.part is not None and blob.asked != "manifest" for blob in self._open.values())
                self._retry.at(now if all_known else now + GATHER_S)
        self._heard = self._fresh = False

    def _report(self, now: float) -> list[Command]:
        """How many chunks have come: soon after some, later after fewer, and soon when nothing more is to come."""
        if not self._got:
            self._report_due = None
            return []
        self._report_due = now + GOT_WITHIN_S if self._report_due is None else self._report_due
        if self._got >= GOT or not self._open:
            self._report_due = min(self._report_due, max(now, self._reported_s + GOT_EVERY_S))
        if now < self._report_due:
            return []
        report = Send(self._got_topic, encode(Got(chunks=self._got)))
        self._got, self._reported_s, self._report_due = 0, now, None
        return [report]

    def _need(self) -> Need:
        """Of the next step of blobs that can go on; where none can, so after a silence, of all."""
        wants: list[Want] = []
        room = MAX_NEED_BYTES
        silent = all(blob.asked != "nothing" for blob in self._open.values())
        for id, blob in self._open.items():
            if blob.part is not None and blob.asked != "nothing" and not silent:
                continue  # its answer is on its way
            chunks = blob.part is not None and blob.asked == "nothing"
            want = Want(id=id, missing=ranges(blob.part.missing()) if blob.part and chunks else None)
            room -= WANT_BYTES + len(want.missing or "")
            if wants and (room < 0 or len(wants) == MAX_NEED_BLOBS):
                break
            wants.append(want)
            blob.asked = "chunks" if chunks else "manifest"
        return Need(blobs=tuple(wants))
