from __future__ import annotations

from random import Random

import pytest

from lwfed.blobs import BlobStore
from lwfed.wire.broadcast import BURST, FANNED_OUT, FASTEST, Broadcast
from lwfed.wire.commands import Send
from lwfed.wire.messages import Manifest, Need, Want, decode
from lwfed.wire.topics import BlobChunk, Topics

TOPICS = Topics("f")


@pytest.fixture
def store(tmp_path) -> BlobStore:
    return BlobStore(tmp_path, durable=False)


@pytest.fixture
def blob(store):
    return store.put(Random(0).randbytes(100 * 1024)).id


@pytest.fixture
def broadcast(store) -> Broadcast:
    return Broadcast(TOPICS, store, 1024)


def need(blob: str, missing: str | None) -> Need:
    return Need(blobs=(Want(id=blob, missing=missing),))


def sent(commands) -> list[int]:
    found = [TOPICS.parse(command.topic) for command in commands]
    return [topic.index for topic in found if isinstance(topic, BlobChunk)]


def drain(broadcast: Broadcast, now: float, room: int = 1000) -> tuple[list[int], float]:
    chunks = []
    while (wakeup := broadcast.next_wakeup(now)) is not None:
        now = wakeup
        chunks += sent(broadcast.poll(now, room))
    return chunks, now


def test_manifests_are_answered_at_once_and_only_for_what_is_held(broadcast, store, blob):
    question = Need(blobs=(Want(id="ab" * 32, missing=None), Want(id="ab" * 32, missing="0"), Want(id=blob, missing=None)))
    (answer,) = broadcast.need("d1", question, 0.0)
    assert answer.topic == TOPICS.to_device("d1", "manifest")
    assert decode(Manifest, answer.payload) == store.manifest(blob, 1024)
    assert broadcast.next_wakeup(0.0) is None


def test_the_union_is_sent_once_lowest_first_after_gathering(broadcast, store, blob):
    broadcast.need("d1", need(blob, "7-9,2"), 10.0)
    broadcast.need("d2", need(blob, "8-11"), 10.2)
    assert broadcast.next_wakeup(10.2) == pytest.approx(10.3)
    assert broadcast.poll(10.2, 100) == []
    (first, *rest) = broadcast.poll(10.3, 100)
    assert first == Send(TOPICS.blob_chunk(blob, 2), store.chunk(store.manifest(blob, 1024), 2))
    assert sent([first, *rest]) == [2, 7, 8, 9, 10, 11]
    assert broadcast.next_wakeup(10.3) is None
    assert broadcast.sent_chunks == 6


def test_it_never_sends_more_than_there_is_room_for_and_then_waits_for_the_transport(broadcast, blob):
    broadcast.need("d1", need(blob, "0-5"), 0.0)
    assert sent(broadcast.poll(1.0, 2)) == [0, 1]
    assert broadcast.next_wakeup(1.0) is None
    assert broadcast.poll(1.0, 0) == []
    assert broadcast.poll(1.0, -3) == []
    assert broadcast.next_wakeup(1.0) is None
    assert sent(broadcast.poll(1.0, 9)) == [2, 3, 4, 5]


def test_the_pace_bounds_chunks_a_second(broadcast, blob):
    broadcast.need("d1", need(blob, "0-99"), 0.0)
    chunks, now = drain(broadcast, 0.0)
    assert chunks == list(range(100))
    assert now == pytest.approx(0.3 + (100 - BURST) / FASTEST, rel=0.05)


def test_more_devices_than_the_broker_can_send_to_at_that_pace_slow_it_down(broadcast, blob):
    for number in range(1000):
        broadcast.need(f"d{number}", need(blob, "0-99"), 0.0)
    chunks, now = drain(broadcast, 0.0)
    assert chunks == list(range(100))
    assert now == pytest.approx(0.3 + 100 * 1000 * 1024 / FANNED_OUT, rel=0.05)


def test_who_asks_again_for_what_was_sent_halves_the_pace_once_a_second(broadcast, blob):
    for device in ("d1", "d2"):
        broadcast.need(device, need(blob, "0-9"), 0.0)
    drain(broadcast, 0.0)
    for device in ("d1", "d2"):
        broadcast.need(device, need(blob, "3"), 2.0)
    assert broadcast.pace == FASTEST / 2
    drain(broadcast, 2.0)
    broadcast.need("d1", need(blob, "3"), 4.0)
    assert broadcast.pace < FASTEST / 2
    pace = broadcast.pace
    for now in range(5, 30):
        broadcast.need(f"late{now}", need(blob, "0-99"), float(now))
        drain(broadcast, float(now))
    assert broadcast.pace > 2 * pace


def test_who_comes_late_says_nothing_about_the_pace(broadcast, blob):
    broadcast.need("d1", need(blob, "0-9"), 0.0)
    drain(broadcast, 0.0)
    broadcast.need("d2", need(blob, "0-9"), 1.0)
    drain(broadcast, 1.0)
    broadcast.need("d1", need(blob, "0-9"), 100.0)  # it was restarted and lost its disk
    assert broadcast.pace == FASTEST


def test_chunks_that_do_not_exist_are_answered_with_the_manifest(broadcast, blob):
    (answer,) = broadcast.need("d1", need(blob, "50-100"), 0.0)
    assert answer.topic == TOPICS.to_device("d1", "manifest")
    assert broadcast.next_wakeup(0.0) is None


def test_a_blob_that_is_forgotten_while_it_is_sent_is_dropped(broadcast, store, blob):
    other = store.put(b"other").id
    broadcast.need("d1", need(blob, "0-99"), 0.0)
    broadcast.need("d1", need(other, "0"), 0.0)
    broadcast.poll(1.0, 3)
    store.forget({other})
    assert sent(broadcast.poll(1.0, 50)) == [0]
    assert broadcast.next_wakeup(1.0) is None


def test_an_uptime_of_years_stops_no_clock(broadcast, blob):
    broadcast.need("d1", need(blob, "0-99"), 3e8)
    chunks, _ = drain(broadcast, 3e8)
    assert chunks == list(range(100))
