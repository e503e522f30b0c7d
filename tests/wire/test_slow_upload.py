"""An upload over a link that takes minutes for a chunk: what the broker has not taken over is lost with the connection."""

from __future__ import annotations

import heapq
from itertools import count

import pytest

from lwfed.blobs import BlobStore
from lwfed.wire.commands import Reconnect, Send
from lwfed.wire.inbox import Inbox
from lwfed.wire.messages import DOWN, UP, Grant, Miss, Offer, Wait, decode
from lwfed.wire.topics import ToDevice, UpdateChunk
from lwfed.wire.upload import Upload

from .uploads import CONTENT, TOPICS, TRAFFIC, make_offer

CHUNKS = 6


class Line:
    def __init__(self, folder, rate: float) -> None:
        store = BlobStore(folder / "device", durable=False)
        self.upload = Upload(TOPICS, "d1", make_offer(store, content=CONTENT), store, seed=0)
        self.inbox = Inbox(TOPICS, BlobStore(folder / "server", durable=False), 1 << 20, lambda contribution: False)
        self.rate = rate
        self.now = self.free_at = 0.0
        self.sent_bytes = self.reconnections = 0
        self.received = False
        self._way: list[tuple[float, int, Send]] = []
        self._numbers = count()

    def run(self) -> None:
        while not self.received:
            for command in self.upload.poll(self.now, self.upload.window - len(self._way), TRAFFIC):
                if isinstance(command, Reconnect):
                    self._break()
                else:
                    self._up(command)
            wakeups = [self.upload.next_wakeup(self.now), self._way[0][0] if self._way else None]
            self.now = min(when for when in wakeups if when is not None)
            while self._way and self._way[0][0] <= self.now:
                self._arrive(heapq.heappop(self._way)[2])

    def _break(self) -> None:
        self.reconnections += 1
        assert self.reconnections < 100
        self._way.clear()
        self.free_at = self.now
        self.upload.reset()

    def _up(self, command: Send) -> None:
        topic = TOPICS.parse(command.topic)
        length = len(command.payload) if isinstance(topic, UpdateChunk) else 1  # chunks of these tests are smaller than an offer
        self.sent_bytes += length
        self.free_at = max(self.free_at, self.now) + length / self.rate
        heapq.heappush(self._way, (self.free_at, next(self._numbers), command))

    def _arrive(self, command: Send) -> None:
        topic = TOPICS.parse(command.topic)
        if isinstance(topic, UpdateChunk):
            answers = self.inbox.chunk(topic, command.payload, self.now)
        elif topic.kind == "offer":
            answers = self.inbox.offer("d1", decode(Offer, command.payload), self.now)
        else:
            answers, update = self.inbox.fin("d1", decode(UP["fin"], command.payload), self.now)
            self.received = update is not None
        for answer in answers:
            kind = TOPICS.parse(answer.topic)
            assert isinstance(kind, ToDevice)
            message = decode(DOWN[kind.kind], answer.payload)
            {Grant: self.upload.on_grant, Miss: self.upload.on_miss, Wait: self.upload.on_wait}[type(message)](message)


@pytest.mark.parametrize(("chunk_s", "reconnections"), [(1, 0), (49, 0), (63, 1), (250, 3), (1000, 5)])
def test_chunks_that_take_long_get_there(tmp_path, chunk_s, reconnections):
    line = Line(tmp_path, 1024 / chunk_s)
    line.run()
    assert line.reconnections == reconnections
    assert line.now < CHUNKS * chunk_s * 1.4 + 10
    assert line.sent_bytes < (CHUNKS + 4 * reconnections) * 1024 + 50
