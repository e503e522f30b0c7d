"""Downloads over a link that takes seconds for a chunk: the broker's queue before it is one line, in virtual time."""

from __future__ import annotations

import heapq
from itertools import count
from random import Random

import pytest

from lwfed.blobs import BlobStore
from lwfed.wire.broadcast import Broadcast
from lwfed.wire.commands import Reconnect, Send
from lwfed.wire.download import Downloads
from lwfed.wire.messages import Got, Manifest, Need, decode
from lwfed.wire.topics import BlobChunk, Topics

TOPICS = Topics("f")
CHUNK_BYTES = 12_288
CONTENT = Random(0).randbytes(140_000)
CHUNKS = -(-len(CONTENT) // CHUNK_BYTES)


class Line:
    """Server and device, and what is on its way between them; the `lost` first sendings of chunks do not arrive."""

    def __init__(self, folder, rate: float, lost: set[int]) -> None:
        server = BlobStore(folder / "server", durable=False)
        self.broadcast = Broadcast(TOPICS, server, CHUNK_BYTES)
        self.downloads = Downloads(TOPICS, "d1", BlobStore(folder / "device", durable=False), seed=0)
        self.downloads.want([server.put(CONTENT)])
        self.rate, self.lost = rate, lost
        self.now = self.free_at = 0.0
        self.sent: list[int] = []  # chunks
        self.questions = self.reconnections = 0
        self._way: list[tuple[float, int, Send]] = []
        self._numbers = count()

    def run(self) -> None:
        """Until nothing is on its way."""
        while True:
            for command in self.downloads.poll(self.now):
                if isinstance(command, Reconnect):
                    self._break()
                elif isinstance(command, Send) and command.topic == TOPICS.from_device("d1", "got"):
                    self.broadcast.got("d1", decode(Got, command.payload).chunks, self.now)
                elif isinstance(command, Send):
                    self.questions += 1
                    self.broadcast.need("d1", decode(Need, command.payload), self.now)
            self._down(self.broadcast.poll(self.now, room=20))
            wakeups = [self.downloads.next_wakeup(self.now), self.broadcast.next_wakeup(self.now), self._way[0][0] if self._way else None]
            due = [when for when in wakeups if when is not None]
            if not due:
                return
            self.now = max(self.now, min(due))
            while self._way and self._way[0][0] <= self.now:
                self._arrive(heapq.heappop(self._way)[2])

    def _break(self) -> None:
        """What is on its way is lost with the connection."""
        self.reconnections += 1
        self._way.clear()
        self.free_at = self.now
        self.downloads.reset()

    def _down(self, commands) -> None:
        for command in commands:
            self.free_at = max(self.free_at, self.now) + len(command.payload) / self.rate
            topic = TOPICS.parse(command.topic)
            if isinstance(topic, BlobChunk):
                self.sent.append(topic.index)
                if self.sent.count(topic.index) == 1 and topic.index in self.lost:
                    continue
            heapq.heappush(self._way, (self.free_at, next(self._numbers), command))

    def _arrive(self, command: Send) -> None:
        topic = TOPICS.parse(command.topic)
        if isinstance(topic, BlobChunk):
            self.downloads.on_chunk(topic.blob, topic.index, command.payload)
        else:
            self.downloads.on_manifest(decode(Manifest, command.payload))


@pytest.mark.parametrize("chunk_s", [0.1, 1.9, 2.4, 5.0])
def test_chunks_that_take_long_are_not_asked_for_again(tmp_path, chunk_s):
    line = Line(tmp_path, CHUNK_BYTES / chunk_s, lost=set())
    line.run()
    assert line.downloads.complete
    assert line.sent == list(range(CHUNKS))
    assert line.now < CHUNKS * chunk_s + 2
    assert line.questions <= 6
    assert line.reconnections == 0


@pytest.mark.parametrize("chunk_s", [0.1, 2.4])
@pytest.mark.parametrize("lost", [{0}, {3, 7}, {CHUNKS - 1}, set(range(CHUNKS))])
def test_what_was_lost_is_sent_again_and_nothing_else(tmp_path, chunk_s, lost):
    line = Line(tmp_path, CHUNK_BYTES / chunk_s, lost)
    line.run()
    assert line.downloads.complete
    assert sorted(line.sent) == sorted([*range(CHUNKS), *lost])


@pytest.mark.parametrize(("chunk_s", "reconnections"), [(25, 0), (80, 2), (800, 5)])
def test_a_chunk_that_takes_longer_than_patience_gets_there_too(tmp_path, chunk_s, reconnections):
    line = Line(tmp_path, CHUNK_BYTES / chunk_s, lost=set())
    line.run()
    assert line.downloads.complete
    assert line.reconnections == reconnections
