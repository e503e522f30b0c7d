from __future__ import annotations

import hashlib
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.blobs import BlobStore
from lwfed.wire.commands import Reconnect, Send, Subscribe, Unsubscribe
from lwfed.wire.download import GOT, GOT_EVERY_S, GOT_WITHIN_S, Downloads
from lwfed.wire.messages import BlobRef, Got, Manifest, Need, decode
from lwfed.wire.retry import SUSPECT_S
from lwfed.wire.topics import Topics
from lwfed.wire.upload import LEAST_PACKET_BYTES, PACKET_MARGIN_BYTES

TOPICS = Topics("f")
CONTENT = Random(0).randbytes(3500)


class Bench:
    """Downloads of one device and the store of a server to serve them from."""

    def __init__(self, folder) -> None:
        self.server = BlobStore(folder / "server", durable=False)
        self.store = BlobStore(folder / "device", durable=False)
        self.downloads = Downloads(TOPICS, "d1", self.store, seed=0)
        self.ref = self.server.put(CONTENT)
        self.manifest = self.server.manifest(self.ref.id, 1024)

    def chunk(self, index: int, manifest: Manifest | None = None) -> None:
        manifest = manifest or self.manifest
        self.downloads.on_chunk(manifest.blob.id, index, self.server.chunk(manifest, index))


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def reported(commands) -> list[int]:
    return [decode(Got, one.payload).chunks for one in commands if isinstance(one, Send) and one.topic == TOPICS.from_device("d1", "got")]


def needs(commands) -> list[tuple[str | None, ...]]:
    sent = [decode(Need, one.payload) for one in commands if isinstance(one, Send) and one.topic == TOPICS.from_device("d1", "need")]
    return [tuple(want.missing for want in need.blobs) for need in sent]


def test_from_wish_to_blob(bench):
    downloads = bench.downloads
    assert downloads.complete
    assert downloads.next_wakeup(0.0) is None
    downloads.want([bench.ref])
    assert not downloads.complete
    assert downloads.next_wakeup(0.0) == 0.0
    (need,) = downloads.poll(0.0)
    assert need == Send(TOPICS.from_device("d1", "need"), need.payload)
    assert needs([need]) == [(None,)]

    downloads.on_manifest(bench.manifest)
    subscribe, need = downloads.poll(0.1)
    assert subscribe == Subscribe(TOPICS.blob_chunks(bench.ref.id))
    assert needs([need]) == [("0-3",)]
    assert downloads.progress() == (0, 3500)

    for index in (3, 0, 0, 1):
        bench.chunk(index)
    assert downloads.progress() == (3500 - 1024, 3500)
    bench.chunk(2)
    assert downloads.complete
    assert downloads.progress() == (3500, 3500)
    unsubscribe, got = downloads.poll(0.2)
    assert unsubscribe == Unsubscribe(TOPICS.blob_chunks(bench.ref.id))
    assert reported([got]) == [5]
    assert downloads.next_wakeup(0.2) is None
    assert bench.store.read(bench.ref.id) == CONTENT


def test_what_is_held_is_not_fetched(bench):
    bench.store.put(CONTENT)
    bench.downloads.want([bench.ref])
    assert bench.downloads.complete
    assert bench.downloads.poll(0.0) == []


def test_another_wish_replaces_the_old_one(bench):
    bench.downloads.want([bench.ref])
    bench.downloads.on_manifest(bench.manifest)
    bench.downloads.poll(0.0)
    other = bench.server.put(b"other")
    bench.downloads.want([other])
    commands = bench.downloads.poll(1.0)
    assert commands[0] == Unsubscribe(TOPICS.blob_chunks(bench.ref.id))
    assert needs(commands) == [(None,)]
    bench.chunk(0)
    bench.downloads.want([])
    assert bench.downloads.complete


def test_silence_is_asked_into_with_growing_patience_and_ends_in_a_reconnection(bench):
    downloads = bench.downloads
    downloads.want([bench.ref])
    now, asked, reconnections = 0.0, [], []
    while now < 300:
        commands = downloads.poll(now)
        asked += [now] * len(needs(commands))
        reconnections += [now for command in commands if isinstance(command, Reconnect)]
        wakeup = downloads.next_wakeup(now)
        assert wakeup is not None
        assert wakeup > now
        now = wakeup
    gaps = [later - earlier for earlier, later in pairwise(asked)]
    assert 1.5 <= gaps[0] <= 2.5
    assert all(earlier < later for earlier, later in pairwise(gaps[:5]))
    assert max(gaps) <= 75
    assert reconnections[0] == next(when for when in asked if when >= SUSPECT_S)
    assert all(later - earlier >= 60 for earlier, later in pairwise(reconnections))


def test_a_chunk_puts_the_next_question_off(bench):
    bench.downloads.want([bench.ref])
    bench.downloads.on_manifest(bench.manifest)
    bench.downloads.poll(0.0)
    bench.chunk(1)
    assert bench.downloads.poll(1.4) == []
    assert bench.downloads.next_wakeup(1.4) >= 1.4 + 1.5
    assert len(needs(bench.downloads.poll(4.0))) == 1


def test_after_a_silence_it_asks_for_the_manifest_and_behind_it_for_what_is_missing(bench):
    bench.downloads.want([bench.ref])
    bench.downloads.on_manifest(bench.manifest)
    assert needs(bench.downloads.poll(0.0)) == [("0-3",)]
    bench.downloads.on_manifest(bench.manifest)  # of an earlier question that was asked twice
    assert bench.downloads.poll(0.1) == []
    assert needs(bench.downloads.poll(4.0)) == [(None,)]
    bench.chunk(1)
    assert bench.downloads.poll(4.1) == []
    assert bench.downloads.next_wakeup(4.1) >= 4.1 + 3, "an answer is on its way behind the chunk"
    bench.downloads.on_manifest(bench.manifest)
    assert needs(bench.downloads.poll(4.2)) == [("0,2-3",)]


def test_a_silence_over_many_blobs_is_asked_into_once_for_each(bench):
    """Polled after every answer, as agents do: a question for each of them would be answered as often."""
    others = [bench.server.manifest(bench.server.put(bytes([number]) * 2000).id, 1024) for number in range(4)]
    bench.downloads.want([manifest.blob for manifest in others])
    for manifest in others:
        bench.downloads.on_manifest(manifest)
    assert needs(bench.downloads.poll(0.0)) == [("0-1",) * 4]
    assert needs(bench.downloads.poll(4.0)) == [(None,) * 4]
    asked = []
    for manifest in others:
        bench.downloads.on_manifest(manifest)
        asked.append(needs(bench.downloads.poll(4.1)))
    assert asked == [[], [], [], [("0-1",) * 4]]
    for manifest in others:  # answers to a question that was doubled on its way
        bench.downloads.on_manifest(manifest)
        assert bench.downloads.poll(4.2) == []


def test_what_is_answered_goes_on_while_another_answer_is_missing(bench):
    other = bench.server.manifest(bench.server.put(b"x" * 2000).id, 1024)
    bench.downloads.want([bench.ref, other.blob])
    for manifest in (bench.manifest, other):
        bench.downloads.on_manifest(manifest)
    bench.downloads.poll(0.0)
    assert needs(bench.downloads.poll(4.0)) == [(None, None)]
    bench.downloads.on_manifest(bench.manifest)
    assert bench.downloads.poll(4.1) == []
    assert needs(bench.downloads.poll(4.4)) == [("0-3",)]
    bench.downloads.on_manifest(other)
    assert needs(bench.downloads.poll(4.5)) == [("0-1",)]


def test_after_a_reset_it_asks_at_once_and_only_for_the_rest(bench):
    bench.downloads.want([bench.ref])
    bench.downloads.on_manifest(bench.manifest)
    bench.downloads.poll(0.0)
    bench.chunk(0)
    bench.downloads.poll(0.1)
    bench.downloads.reset()
    assert needs(bench.downloads.poll(0.2)) == [("1-3",)]


def test_manifests_that_come_together_are_asked_for_together(bench):
    other = bench.server.manifest(bench.server.put(b"x" * 2000).id, 1024)
    bench.downloads.want([bench.ref, other.blob])
    bench.downloads.poll(0.0)
    bench.downloads.on_manifest(bench.manifest)
    assert needs(bench.downloads.poll(0.1)) == []
    bench.downloads.on_manifest(other)
    assert needs(bench.downloads.poll(0.15)) == [("0-3", "0-1")]


def test_answers_that_come_one_by_one_are_not_each_answered_with_another_question(bench):
    others = [bench.server.put(bytes([number]) * 3000) for number in range(3)]
    manifests = [bench.server.manifest(ref.id, 1024) for ref in others]
    bench.downloads.want(others)
    bench.downloads.poll(0.0)
    for manifest in manifests:
        bench.downloads.on_manifest(manifest)
    assert needs(bench.downloads.poll(0.1)) == [("0-2",) * 3]
    assert needs(bench.downloads.poll(5.0)) == [(None,) * 3], "nothing has come"
    asked = []
    for manifest in manifests[:2]:
        bench.downloads.on_manifest(manifest)
        asked += needs(bench.downloads.poll(5.1))
    assert asked == []
    assert needs(bench.downloads.poll(bench.downloads.next_wakeup(5.1))) == [("0-2", "0-2")], "the third answer is on its way"
    bench.downloads.on_manifest(manifests[2])
    assert needs(bench.downloads.poll(5.5)) == [("0-2",)], "the others have been asked for"


def test_a_manifest_that_never_comes_does_not_hold_up_the_others(bench):
    other = BlobRef(id="ab" * 32, size=1)
    bench.downloads.want([bench.ref, other])
    bench.downloads.poll(0.0)
    bench.downloads.on_manifest(bench.manifest)
    bench.downloads.poll(0.1)
    wakeup = bench.downloads.next_wakeup(0.1)
    assert wakeup == pytest.approx(0.3)
    assert needs(bench.downloads.poll(wakeup)) == [("0-3", None)]


@pytest.fixture
def long(bench):
    """A device in the midst of a hundred chunks, and what brings it the next one."""
    ref = bench.server.put(Random(1).randbytes(100 * 1024))
    bench.manifest = bench.server.manifest(ref.id, 1024)
    bench.downloads.want([ref])
    bench.downloads.on_manifest(bench.manifest)
    bench.downloads.poll(0.0)
    numbers = iter(range(100))
    return lambda count: [bench.chunk(next(numbers)) for _ in range(count)]


def test_chunks_that_have_come_are_reported_a_few_together(bench, long):
    downloads = bench.downloads
    long(GOT - 1)
    assert reported(downloads.poll(1.0)) == []
    long(1)
    assert reported(downloads.poll(1.1)) == [GOT]
    long(50)
    assert reported(downloads.poll(1.2)) == [], "not in every moment"
    assert downloads.next_wakeup(1.2) == 1.1 + GOT_EVERY_S
    assert reported(downloads.poll(1.1 + GOT_EVERY_S)) == [50]
    assert reported(downloads.poll(9.0)) == []


def test_a_single_chunk_is_reported_after_a_while(bench, long):
    downloads = bench.downloads
    long(1)
    assert reported(downloads.poll(1.0)) == []
    assert reported(downloads.poll(0.9 + GOT_WITHIN_S)) == []
    assert reported(downloads.poll(1.0 + GOT_WITHIN_S)) == [1]
    downloads.on_chunk("ab" * 32, 0, b"what another one wanted")
    downloads.on_chunk(bench.manifest.blob.id, 0, b"damaged")
    assert reported(downloads.poll(9.0)) == [2], "the broker had them all the same"


def test_nothing_is_reported_of_another_connection(bench, long):
    downloads = bench.downloads
    long(50)
    downloads.reset()
    assert reported(downloads.poll(1.0)) == []


def test_the_last_ones_are_reported_soon_and_what_comes_after_them_not_in_every_moment(bench, long):
    downloads = bench.downloads
    long(99)
    assert reported(downloads.poll(1.0)) == [99]
    long(1)
    assert downloads.complete
    assert reported(downloads.poll(1.1)) == []
    assert downloads.next_wakeup(1.1) == 1.0 + GOT_EVERY_S
    bench.chunk(0)
    assert reported(downloads.poll(1.0 + GOT_EVERY_S)) == [2]
    assert downloads.next_wakeup(2.0) is None


def test_what_nobody_wanted_is_ignored(bench):
    bench.downloads.on_manifest(bench.manifest)
    bench.chunk(0)
    bench.downloads.want([BlobRef(id=bench.ref.id, size=9)])
    bench.downloads.on_manifest(bench.manifest)  # of another size than announced
    assert not bench.downloads.complete
    assert not bench.store.has(bench.ref.id)


def test_damaged_chunks_are_counted_and_in_the_end_the_manifest_is_doubted(bench):
    bench.downloads.want([bench.ref])
    bench.downloads.on_manifest(bench.manifest)
    bench.downloads.poll(0.0)
    for count in (1, 2, 3):
        bench.downloads.on_chunk(bench.ref.id, 0, b"junk")
        assert bench.downloads.bad_chunks == count
    bench.downloads.poll(0.1)
    assert needs(bench.downloads.poll(10.0)) == [(None,)]


def test_a_need_fits_into_the_packets_of_a_broker_that_carries_updates(bench):
    """At its worst every second chunk of many large blobs is missing."""
    digest = hashlib.sha256(bytes(1024)).hexdigest()
    manifests = [
        Manifest(blob=BlobRef(id=f"{number:064x}", size=1000 * 1024), chunk_bytes=1024, digests=(digest, "00" * 32) * 500)
        for number in range(70)
    ]
    bench.downloads.want([manifest.blob for manifest in manifests])
    (need,) = bench.downloads.poll(0.0)
    assert len(decode(Need, need.payload).blobs) == 64
    assert len(need.payload) < LEAST_PACKET_BYTES - PACKET_MARGIN_BYTES
    for manifest in manifests:
        bench.downloads.on_manifest(manifest)
        for index in range(0, 1000, 2):
            bench.downloads._open[manifest.blob.id].part._missing.discard(index)
    *_, need = bench.downloads.poll(1.0)
    assert 1 < len(decode(Need, need.payload).blobs) < 64
    assert len(need.payload) < LEAST_PACKET_BYTES - PACKET_MARGIN_BYTES


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_it_converges_whatever_comes(tmp_path_factory, data):
    """Any chunks, wanted or not, damaged or doubled, any manifest, any order: then one honest answer completes it."""
    bench = Bench(tmp_path_factory.mktemp("property"))
    bench.downloads.want([bench.ref])
    other_cut = bench.server.manifest(bench.ref.id, 2048)
    now = 0.0
    for _ in range(data.draw(st.integers(0, 25))):
        now += data.draw(st.floats(0, 5))
        match data.draw(st.sampled_from(["manifest", "cut", "chunk", "other", "junk", "reset", "poll"])):
            case "manifest":
                bench.downloads.on_manifest(bench.manifest)
            case "cut":
                bench.downloads.on_manifest(other_cut)
            case "chunk":
                bench.chunk(data.draw(st.integers(0, 3)))
            case "other":
                bench.chunk(data.draw(st.integers(0, 1)), other_cut)
            case "junk":
                bench.downloads.on_chunk(bench.ref.id, data.draw(st.integers(0, 9)), data.draw(st.binary(max_size=20)))
            case "reset":
                bench.downloads.reset()
        bench.downloads.poll(now)
    bench.downloads.on_manifest(bench.manifest)
    for index in range(4):
        bench.chunk(index)
    assert bench.downloads.complete
    assert bench.store.read(bench.ref.id) == CONTENT
