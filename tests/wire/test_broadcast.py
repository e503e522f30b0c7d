from __future__ import annotations

from math import log
from random import Random

import pytest

from lwfed.blobs import BlobStore
from lwfed.wire.broadcast import BURST, FASTEST, GATHER_S, HELD_EACH, LOOK_S, SILENT_S, Broadcast
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


def receivers(commands) -> list[tuple[int, str | None]]:
    found = [TOPICS.parse(command.topic) for command in commands]
    return [(topic.index, topic.device) for topic in found if isinstance(topic, BlobChunk)]


def drain(broadcast: Broadcast, now: float, room: int = 1000) -> tuple[list[int], float]:
    chunks = []
    while (wakeup := broadcast.next_wakeup(now)) is not None:
        now = wakeup
        chunks += sent(broadcast.poll(now, room))
    return chunks, now


def test_manifests_are_answered_at_once_and_only_for_what_is_held(broadcast, store, blob):
    question = Need(blobs=(Want(id="ab" * 32, missing=None), Want(id="ab" * 32, missing="0"), Want(id=blob, missing=None)))
    broadcast.need("d1", question, 0.0)
    broadcast.need("d1", question, 0.0)
    assert broadcast.next_wakeup(0.0) == 0.0
    (answer,) = broadcast.poll(0.0, 9)
    assert answer.topic == TOPICS.to_device("d1", "manifest")
    assert decode(Manifest, answer.payload) == store.manifest(blob, 1024)
    assert broadcast.next_wakeup(0.0) is None


def test_manifests_wait_for_room(broadcast, blob):
    devices = [f"d{number}" for number in range(5)]
    for device in devices:
        broadcast.need(device, need(blob, None), 0.0)
    asked = []
    for room in (2, 0, 2, 9):
        asked += [command.topic for command in broadcast.poll(0.0, room)]
        assert broadcast.next_wakeup(0.0) is None
    assert asked == [TOPICS.to_device(device, "manifest") for device in devices]


def test_the_union_is_sent_once_lowest_first_after_gathering(broadcast, store, blob):
    broadcast.need("d1", need(blob, "2,7-9"), 10.0)
    broadcast.need("d2", need(blob, "8-11"), 10.2)
    assert broadcast.next_wakeup(10.2) == pytest.approx(10.3)
    assert broadcast.poll(10.2, 100) == []
    (first, *rest) = broadcast.poll(10.3, 100)
    assert first == Send(TOPICS.blob_chunk(blob, 2, "d1"), store.chunk(store.manifest(blob, 1024), 2))
    assert sent([first, *rest]) == [2, 7, 8, 9, 10, 11]
    assert broadcast.next_wakeup(10.3) is None
    assert broadcast.sent_chunks == 6


def test_what_half_of_them_lack_goes_to_each_of_these_alone(broadcast, blob):
    for device, missing in (("d1", "0-5"), ("d2", "0-4"), ("d3", "0-3"), ("d4", "0-2")):
        broadcast.need(device, need(blob, missing), 0.0)
    assert receivers(broadcast.poll(GATHER_S, 1000)) == [
        *((index, None) for index in range(4)),
        *((4, "d1"), (4, "d2")),
        (5, "d1"),
    ]
    assert broadcast.sent_chunks == 7


def test_who_has_everything_is_none_of_them(broadcast, blob):
    """It does not listen any more, so what goes to all goes to the one that is left."""
    for device in ("d1", "d2"):
        broadcast.need(device, need(blob, "0-3"), 0.0)
    assert receivers(broadcast.poll(GATHER_S, 1000)) == [(index, None) for index in range(4)]
    broadcast.got("d1", 4, 0.5)
    broadcast.need("d2", need(blob, "2"), 1.0)
    assert receivers(broadcast.poll(1.5, 1000)) == [(2, None)]


def test_what_a_broken_link_has_lost_goes_to_nobody_who_still_takes_what_is_on_its_way(broadcast, blob):
    for device in ("d1", "d2"):
        broadcast.need(device, need(blob, "0-9"), 0.0)
    broadcast.poll(GATHER_S, 1000)
    broadcast.poll(GATHER_S + 1, 1000)
    broadcast.got("d1", 2, 1.5)
    broadcast.need("d2", need(blob, "8-9"), 2.0)
    assert receivers(broadcast.poll(2.5, 1) + broadcast.poll(3.5, 1)) == [(8, "d2"), (9, "d2")]
    assert broadcast.next_wakeup(4.0) is None


def test_what_was_lost_on_its_way_to_one_alone_slows_that_one(broadcast, blob):
    broadcast.need("d1", need(blob, "0-99"), 0.0)
    broadcast.need("d2", need(blob, "0-9"), 0.0)
    drain(broadcast, 0.0)
    broadcast.need("d1", need(blob, "90-99"), 2.0)
    assert seconds_for(broadcast, 2.0) == pytest.approx(9 / (FASTEST / 2), rel=0.1)
    broadcast.need("d2", need(blob, "90-99"), 4.0)
    assert seconds_for(broadcast, 4.0) < 9 / FASTEST, "it was never sent these"


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


@pytest.fixture
def ten(broadcast, blob, monkeypatch):
    """Of ten devices, who lack all chunks, the broker may hold a hundred."""
    monkeypatch.setattr("lwfed.wire.broadcast.HELD_BYTES", 100 * 1024)
    devices = [f"d{number}" for number in range(10)]
    for device in devices:
        broadcast.need(device, need(blob, "0-99"), 0.0)
    assert sent(broadcast.poll(0.3, 1000)) == list(range(8))
    assert sent(broadcast.poll(0.4, 1000)) == [8, 9]
    return devices


def test_what_the_broker_holds_for_all_together_is_bounded(broadcast, ten):
    assert sent(broadcast.poll(1.0, 1000)) == []
    for device in ten:
        broadcast.got(device, 3, 1.0)
    assert sent(broadcast.poll(1.0, 1000)) == [10, 11, 12]
    broadcast.got(ten[0], 10, 1.5)
    assert sent(broadcast.poll(1.5, 1000)) == [13], "it is all of them together that count"
    broadcast.got(ten[0], 10**6, 1.6)
    assert sent(broadcast.poll(1.6, 1000)) == [14], "no report takes away more than went out"


def test_who_is_silent_is_waited_for_once_until_it_speaks_again(broadcast, ten):
    now, chunks = 0.4, []
    while len(chunks) < 60:
        now += 0.1
        broadcast.got(ten[0], 10, now)
        chunks += sent(broadcast.poll(now, 1000))
    assert SILENT_S < now < 0.3 + SILENT_S + 2 * LOOK_S + 2
    for device in ten:
        broadcast.got(device, 1, now)
    assert sent(broadcast.poll(now + 1, 1000)) == []


def test_while_all_are_silent_nothing_goes_out_until_one_says_what_it_lacks(broadcast, blob, ten):
    for now in range(1, 60):
        assert sent(broadcast.poll(float(now), 1000)) == []
    broadcast.need(ten[0], need(blob, "10-99"), 60.0)
    assert sent(broadcast.poll(61.0, 3)) == [10, 11, 12]


def test_several_downloads_in_a_row_are_each_as_fast(broadcast, store, monkeypatch):
    """What came last of the one before was never reported: nothing more was to come."""
    monkeypatch.setattr("lwfed.wire.broadcast.HELD_BYTES", 0)
    for number in range(20):
        blob = store.put(Random(number).randbytes(3 * 1024)).id
        for device in range(10):
            broadcast.need(f"d{device}", need(blob, "0-2"), float(number))
        assert sent(broadcast.poll(number + GATHER_S, 1000)) == [0, 1, 2]


def test_slow_devices_hold_up_none_that_keep_up(broadcast, blob, monkeypatch):
    """The broker holds of each what it ever holds, and the rest in one copy."""
    monkeypatch.setattr("lwfed.wire.broadcast.HELD_BYTES", 0)
    for number in range(10):
        broadcast.need(f"d{number}", need(blob, "0-99"), 0.0)
    chunks, now = [], 0.3
    while len(chunks) < 100:
        new = sent(broadcast.poll(now, 1000))
        assert new, "something can always go out"
        chunks += new
        for number in range(3):
            broadcast.got(f"d{number}", len(new), now)
        now += 0.1
    assert now < 5


def test_while_the_broker_holds_much_nobody_is_called_all_the_time(broadcast, store, ten):
    blob = store.put(b"another").id
    broadcast.need("d0", need(blob, "0"), 5.0)
    now, looks = 5.0, 0
    while now < 10:
        broadcast.poll(now, 1000)
        now, looks = broadcast.next_wakeup(now), looks + 1
    assert looks <= 5


def test_a_single_slow_device_is_sent_everything(broadcast, store, monkeypatch):
    """The broker has most of it in one copy for all."""
    monkeypatch.setattr("lwfed.wire.broadcast.HELD_BYTES", (HELD_EACH + 1) * 1024)
    blob = store.put(Random(1).randbytes(100 * 1024)).id
    broadcast.need("d1", need(blob, "0-99"), 0.0)
    chunks, now = drain(broadcast, 0.0)
    assert chunks == list(range(100))
    assert now < 1


def test_chunks_that_were_lost_are_not_on_their_way_any_more(broadcast, blob, ten):
    for device in ten:
        broadcast.need(device, need(blob, "0-99"), 2.0)
    assert sent(broadcast.poll(2.0, 1000))


def test_a_report_of_a_device_that_never_asked_is_ignored(broadcast):
    broadcast.got("d1", 5, 0.0)
    assert broadcast.next_wakeup(0.0) is None


def seconds_for(broadcast: Broadcast, now: float) -> float:
    return drain(broadcast, now)[1] - now - GATHER_S


def test_what_is_asked_for_again_comes_at_half_the_pace_and_slower_each_time(broadcast, blob):
    broadcast.need("d1", need(blob, "0-19"), 0.0)
    drain(broadcast, 0.0)
    for times in (1, 2, 3):
        broadcast.need("d1", need(blob, "0-19"), 2.0 * times)
        assert seconds_for(broadcast, 2.0 * times) == pytest.approx(19 / (FASTEST / 2**times), rel=0.1)


def test_a_pace_recovers_by_a_tenth_in_each_second_of_sending(broadcast, blob):
    for now in range(0, 12, 2):
        broadcast.need("d1", need(blob, "0"), float(now))
        drain(broadcast, float(now))
    slowed = FASTEST / 2**5
    broadcast.need("d1", need(blob, "1-99"), 12.0)
    assert seconds_for(broadcast, 12.0) == pytest.approx(10 * log((slowed + 9.9) / slowed), rel=0.05)


def test_one_that_asks_again_and_again_holds_up_nobody(broadcast, blob):
    devices = [f"d{number}" for number in range(9)]
    for device in devices:
        broadcast.need(device, need(blob, "0-99"), 0.0)
    now, fetched = 0.0, []
    while len(fetched) < 100:
        broadcast.need("bad", need(blob, "0-99"), now)
        fetched += sent(broadcast.poll(now := now + GATHER_S, 4))
    assert fetched == list(range(100))


def test_who_loses_chunks_sets_the_pace_of_nobody_else(broadcast, blob):
    for now in (0.0, 2.0, 4.0, 6.0, 8.0, 10.0):
        broadcast.need("bad", need(blob, "0"), now)
        drain(broadcast, now)
    broadcast.need("good", need(blob, "0-99"), 12.0)
    broadcast.need("bad", need(blob, "0-99"), 12.0)
    assert seconds_for(broadcast, 12.0) == pytest.approx((100 - BURST) / FASTEST, rel=0.05)


def test_a_broker_that_loses_what_all_are_sent_is_sent_less(broadcast, blob):
    devices = [f"d{number}" for number in range(9)]
    took = []
    for now in (0.0, 5.0, 10.0):
        for device in devices:
            broadcast.need(device, need(blob, "0-99"), now)
        took.append(seconds_for(broadcast, now))
    assert took[1:] == pytest.approx([99 / (FASTEST / 2), 99 / (FASTEST / 4)], rel=0.1)


def test_devices_that_have_all_cost_a_late_one_nothing(broadcast, blob):
    for number in range(1000):
        broadcast.need(f"d{number}", need(blob, "0-99"), 0.0)
    _, now = drain(broadcast, 0.0)
    broadcast.need("late", need(blob, "0-99"), now + 5)
    assert seconds_for(broadcast, now + 5) == pytest.approx((100 - BURST) / FASTEST, rel=0.05)


def test_who_comes_late_says_nothing_about_the_pace(broadcast, blob):
    broadcast.need("d1", need(blob, "0-9"), 0.0)
    drain(broadcast, 0.0)
    broadcast.need("d2", need(blob, "0-9"), 1.0)
    drain(broadcast, 1.0)
    broadcast.need("d1", need(blob, "0-99"), 100.0)  # it was restarted and lost its disk
    assert seconds_for(broadcast, 100.0) == pytest.approx((100 - BURST) / FASTEST, rel=0.05)


def test_chunks_that_do_not_exist_are_answered_with_the_manifest(broadcast, blob):
    broadcast.need("d1", need(blob, "50-100"), 0.0)
    (answer,) = broadcast.poll(0.0, 9)
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
