"""The server's end of uploads, against messages written by hand."""

from __future__ import annotations

import hashlib
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.blobs import BlobStore
from lwfed.wire.inbox import Inbox, ReceivedUpdate
from lwfed.wire.messages import DOWN, Done, Fin, Grant, Manifest, Miss, Offer, Wait
from lwfed.wire.topics import UpdateChunk

from .uploads import CONTENT, TOPICS, TRAFFIC, make_offer, said


@pytest.fixture
def store(tmp_path) -> BlobStore:
    return BlobStore(tmp_path / "device", durable=False)


@pytest.fixture
def spool(tmp_path) -> BlobStore:
    return BlobStore(tmp_path / "spool", durable=False)


@pytest.fixture
def recorded() -> set[str]:
    return set()


@pytest.fixture
def inbox(spool, recorded) -> Inbox:
    return Inbox(TOPICS, spool, 10_000, recorded.__contains__, slots=2)


def chunk(inbox: Inbox, offer: Offer, index: int, now: float = 0.0, device: str = "d1", content: bytes = CONTENT):
    topic = UpdateChunk(device, "w0", offer.contribution, index)
    return inbox.chunk(topic, content[index * 1024 : (index + 1) * 1024], now)


def fin(offer: Offer) -> Fin:
    return Fin(contribution=offer.contribution, traffic=TRAFFIC)


def receive(inbox: Inbox, offer: Offer, device: str = "d1", content: bytes = CONTENT) -> ReceivedUpdate:
    inbox.offer(device, offer, 0.0)
    for index in range(6):
        chunk(inbox, offer, index, device=device, content=content)
    _, update = inbox.fin(device, fin(offer), 0.0)
    assert update is not None
    return update


def test_an_update_is_received_checked_and_only_then_done(inbox, store, recorded):
    offer = make_offer(store)
    (answer,) = inbox.offer("d1", offer, 0.0)
    assert answer.topic == TOPICS.to_device("d1", "grant")
    assert said([answer], DOWN) == [Grant(contribution=offer.contribution, worker="w0", missing="0-5", window=4)]
    for index in (5, 0, 0, 3, 2):
        assert chunk(inbox, offer, index) == []
    commands, update = inbox.fin("d1", fin(offer), 1.0)
    assert said(commands, DOWN) == [Miss(contribution=offer.contribution, missing="1,4")]
    assert update is None
    chunk(inbox, offer, 1)
    chunk(inbox, offer, 4)
    commands, update = inbox.fin("d1", fin(offer), 2.0)
    assert commands == []
    assert update == ReceivedUpdate("d1", offer, update.path, TRAFFIC)
    assert update.path.read_bytes() == CONTENT

    assert inbox.fin("d1", fin(offer), 2.5) == ([], None)  # it is being checked
    assert said(inbox.offer("d1", offer, 2.5), DOWN) == [Wait(contribution=offer.contribution, retry_s=5.0)]
    recorded.add(offer.contribution)
    done = [Done(contribution=offer.contribution)]
    assert said(inbox.accept(offer.contribution), DOWN) == done
    assert said(inbox.offer("d1", offer, 3.0), DOWN) == done
    assert said(inbox.fin("d1", fin(offer), 3.0)[0], DOWN) == done
    with pytest.raises(KeyError):
        inbox.accept(offer.contribution)


def test_a_new_inbox_resumes_from_the_part_and_from_a_finished_file(inbox, store, spool, recorded):
    offer = make_offer(store)
    inbox.offer("d1", offer, 0.0)
    for index in (0, 1, 4):
        chunk(inbox, offer, index)
    second = Inbox(TOPICS, spool, 10_000, recorded.__contains__)
    assert said(second.fin("d1", fin(offer), 0.0)[0], DOWN) == [Wait(contribution=offer.contribution, retry_s=0)]
    assert said(second.offer("d1", offer, 0.0), DOWN)[0].missing == "2-3,5"
    for index in (2, 3, 5):
        chunk(second, offer, index)
    assert second.fin("d1", fin(offer), 0.0)[1] is not None

    third = Inbox(TOPICS, spool, 10_000, recorded.__contains__)  # the server died before it recorded the update
    assert said(third.offer("d1", offer, 0.0), DOWN)[0].missing == ""
    _, update = third.fin("d1", fin(offer), 0.0)
    spool.adopt(update.path)
    fourth = Inbox(TOPICS, spool, 10_000, recorded.__contains__)  # it died after it had taken the file over
    assert said(fourth.offer("d1", offer, 0.0), DOWN)[0].missing == ""
    assert fourth.fin("d1", fin(offer), 0.0)[1] is not None


def test_who_finds_no_slot_waits_in_order_and_silence_loses_a_slot(inbox, store):
    devices = ["d1", "d2", "d3", "d4"]
    offers = {device: make_offer(store, device) for device in devices}
    kinds = [type(said(inbox.offer(device, offers[device], 0.0), DOWN)[0]) for device in devices]
    assert kinds == [Grant, Grant, Wait, Wait]
    assert inbox.next_wakeup(0.0) == 10.0
    chunk(inbox, offers["d2"], 0, now=6.0, device="d2")
    assert inbox.poll(9.9) == []
    (granted,) = inbox.poll(10.0)  # d1 was silent
    assert granted.topic == TOPICS.to_device("d3", "grant")
    assert inbox.next_wakeup(10.0) == 16.0
    commands = inbox.refuse("d2", offers["d2"].contribution, "stale", "over") + inbox.poll(11.0)
    assert [command.topic for command in commands] == [TOPICS.to_device("d2", "refuse"), TOPICS.to_device("d4", "grant")]
    assert inbox.next_wakeup(11.0) is None


def test_who_offers_again_while_it_waits_keeps_its_place(inbox, store):
    devices = ["d1", "d2", "d3", "d4"]
    offers = {device: make_offer(store, device) for device in devices}
    for device in (*devices, "d3"):
        inbox.offer(device, offers[device], 0.0)
    inbox.refuse("d1", offers["d1"].contribution, "stale", "over")
    assert [command.topic for command in inbox.poll(1.0)] == [TOPICS.to_device("d3", "grant")]


def test_only_what_was_missing_keeps_a_slot(inbox, store):
    offers = {device: make_offer(store, device, content=CONTENT + device.encode()) for device in ("d1", "d2", "d3")}
    for device, offer in offers.items():
        inbox.offer(device, offer, 0.0)
    chunk(inbox, offers["d1"], 0, now=1.0)
    for now in (4.0, 8.0, 10.9):
        inbox.offer("d1", offers["d1"], now)
        chunk(inbox, offers["d1"], 0, now)
        inbox.chunk(UpdateChunk("d1", "w0", offers["d1"].contribution, 1), b"junk", now)
        inbox.fin("d1", fin(offers["d1"]), now)
        chunk(inbox, offers["d2"], int(now) // 4, now, device="d2")
        assert inbox.poll(now) == []
    (granted,) = inbox.poll(11.0)
    assert granted.topic == TOPICS.to_device("d3", "grant")


def test_a_device_that_loses_its_slot_leaves_one_part_which_it_may_resume(inbox, store, tmp_path):
    parts = tmp_path / "spool" / "parts"
    for device in ("d2", "d3"):
        inbox.offer(device, make_offer(store, device, content=device.encode() * 1000), 0.0)
    before = len(list(parts.iterdir()))
    now = 0.0
    for number in range(4):
        offer = make_offer(store, content=bytes([number]) * 5000)
        inbox.offer("d1", offer, now)
        inbox.poll(now := now + 11)
        chunk(inbox, offer, 0, now, content=bytes([number]) * 5000)
        for device in ("d2", "d3"):
            inbox.offer(device, make_offer(store, device, content=device.encode() * 1000), now)
        inbox.poll(now := now + 11)
        assert len(list(parts.iterdir())) == before + 1
    answers = said(inbox.offer("d1", offer, now) + inbox.poll(now + 11), DOWN)
    assert [answer.missing for answer in answers if isinstance(answer, Grant) and answer.contribution == offer.contribution] == ["1-4"]
    inbox.clear("stale", "the round is over")
    assert list(parts.iterdir()) == []


def test_chunks_that_were_on_their_way_when_a_slot_was_lost_are_kept(inbox, store):
    """On a link that is slower than a chunk in ten seconds nothing else would ever arrive."""
    offer = make_offer(store)
    for device, one in (("d1", offer), *((name, make_offer(store, name, content=name.encode() * 1000)) for name in ("d2", "d3"))):
        inbox.offer(device, one, 0.0)
    inbox.poll(10.0)
    assert said(chunk(inbox, offer, 0, now=12.0), DOWN) == [Wait(contribution=offer.contribution, retry_s=0)]
    assert chunk(inbox, offer, 1, now=12.5) == []
    answers = said(inbox.offer("d1", offer, 13.0) + inbox.poll(30.0), DOWN)
    assert [one.missing for one in answers if isinstance(one, Grant) and one.contribution == offer.contribution] == ["2-5"]


def test_an_update_that_is_cut_otherwise_leaves_no_part_behind(inbox, store, tmp_path):
    offer = make_offer(store)
    inbox.offer("d1", offer, 0.0)
    inbox.offer("d1", offer.model_copy(update={"manifest": store.manifest(offer.manifest.blob.id, 2048)}), 1.0)
    assert len(list((tmp_path / "spool" / "parts").iterdir())) == 1


def test_silence_costs_nothing_while_nobody_waits(inbox, store):
    offer = make_offer(store)
    inbox.offer("d1", offer, 0.0)
    assert inbox.next_wakeup(0.0) is None
    assert inbox.poll(1000.0) == []
    assert chunk(inbox, offer, 0, now=1000.0) == []


def test_who_sends_without_a_slot_is_told_to_offer_again(inbox, store):
    offer = make_offer(store)
    assert said(chunk(inbox, offer, 0, now=0.0), DOWN) == [Wait(contribution=offer.contribution, retry_s=0)]
    assert chunk(inbox, offer, 1, now=0.5) == []
    assert len(chunk(inbox, offer, 2, now=1.5)) == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"contribution": "00" * 16}, "identity"),
        ({"round": 2}, "identity"),
        ({}, "identity"),  # offered by another device
    ],
)
def test_an_offer_under_a_false_name_is_refused(inbox, store, change, code):
    offer = make_offer(store).model_copy(update=change)
    (refusal,) = said(inbox.offer("d1" if change else "d2", offer, 0.0), DOWN)
    assert (refusal.code, refusal.contribution) == (code, offer.contribution)


def test_no_device_touches_the_update_of_another(inbox, store):
    offer = make_offer(store)
    inbox.offer("d1", offer, 0.0)
    chunk(inbox, offer, 0, device="d2")
    assert inbox.fin("d2", fin(offer), 0.0)[1] is None
    inbox.refuse("d2", offer.contribution, "stale", "")
    chunk(inbox, offer, 1)
    assert said(inbox.fin("d1", fin(offer), 0.0)[0], DOWN) == [Miss(contribution=offer.contribution, missing="0,2-5")]


def test_too_large_is_refused_before_a_byte_is_kept(inbox, store, spool, tmp_path):
    (refusal,) = said(inbox.offer("d1", make_offer(store, content=bytes(10_001)), 0.0), DOWN)
    assert refusal.code == "too_large"
    assert list((tmp_path / "spool" / "parts").iterdir()) == []


def test_what_is_recorded_is_done_although_the_present_stage_has_smaller_updates(inbox, store, recorded):
    offer = make_offer(store)
    recorded.add(offer.contribution)
    inbox.limit_bytes = 0
    assert said(inbox.offer("d1", offer, 0.0), DOWN) == [Done(contribution=offer.contribution)]


def test_a_device_has_one_part_at_a_time(inbox, store, tmp_path):
    for round in (1, 2, 3):
        inbox.offer("d1", make_offer(store, content=bytes([round]) * 2000, round=round), 0.0)
    assert len(list((tmp_path / "spool" / "parts").iterdir())) == 1
    inbox.clear("stale", "the round is over")
    assert list((tmp_path / "spool" / "parts").iterdir()) == []


def test_damaged_chunks_are_counted_and_asked_for_again(inbox, store):
    offer = make_offer(store)
    inbox.offer("d1", offer, 0.0)
    inbox.chunk(UpdateChunk("d1", "w0", offer.contribution, 0), b"junk", 0.0)
    inbox.chunk(UpdateChunk("d1", "w0", offer.contribution, 999), b"junk", 0.0)
    assert inbox.bad_chunks == 2
    assert said(inbox.fin("d1", fin(offer), 0.0)[0], DOWN) == [Miss(contribution=offer.contribution, missing="0-5")]


def test_chunks_that_do_not_make_up_the_blob_are_refused_as_digest(inbox, store):
    honest = make_offer(store)
    swapped = honest.manifest.digests[::-1]
    lie = honest.model_copy(update={"manifest": Manifest(blob=honest.manifest.blob, chunk_bytes=1024, digests=swapped)})
    inbox.offer("d1", lie, 0.0)
    for index in range(6):
        data = CONTENT[(5 - index) * 1024 : (6 - index) * 1024]
        inbox.chunk(UpdateChunk("d1", "w0", lie.contribution, index), data, 0.0)
    commands, update = inbox.fin("d1", fin(lie), 0.0)
    assert [item.code for item in said(commands, DOWN)] == ["digest"]
    assert update is None
    assert receive(inbox, honest).path.read_bytes() == CONTENT


def test_two_devices_with_the_same_update_both_count(inbox, store):
    updates = [receive(inbox, make_offer(store, device), device) for device in ("d1", "d2")]
    assert updates[0].path != updates[1].path
    assert [update.path.read_bytes() for update in updates] == [CONTENT, CONTENT]


def test_what_is_refused_of_one_device_stays_of_another(inbox, store):
    offers = {device: make_offer(store, device) for device in ("d1", "d2")}
    for device, offer in offers.items():
        inbox.offer(device, offer, 0.0)
    for index in range(3):
        chunk(inbox, offers["d2"], index, device="d2")
    receive(inbox, offers["d1"])
    inbox.refuse("d1", offers["d1"].contribution, "not_finite", "NaN")
    assert said(inbox.fin("d2", fin(offers["d2"]), 0.0)[0], DOWN) == [Miss(contribution=offers["d2"].contribution, missing="3-5")]
    for index in range(3, 6):
        chunk(inbox, offers["d2"], index, device="d2")
    _, update = inbox.fin("d2", fin(offers["d2"]), 0.0)
    assert update.path.read_bytes() == CONTENT
    assert receive(inbox, offers["d1"]).path.read_bytes() == CONTENT


def test_a_device_that_loses_its_slot_leaves_the_part_of_one_with_the_same_update(inbox, store):
    same = {device: make_offer(store, device) for device in ("d1", "d2")}
    for device, offer in same.items():
        inbox.offer(device, offer, 0.0)
        chunk(inbox, offer, 0, device=device)
    inbox.offer("d3", make_offer(store, "d3", content=b"d3" * 1000), 0.0)
    chunk(inbox, same["d2"], 1, now=5.0, device="d2")
    inbox.poll(10.0)
    inbox.offer("d1", make_offer(store, content=b"other" * 1000), 11.0)  # its part goes
    assert said(inbox.fin("d2", fin(same["d2"]), 11.0)[0], DOWN) == [Miss(contribution=same["d2"].contribution, missing="2-5")]


def test_a_part_that_somebody_deleted_arrives_again(inbox, store, tmp_path):
    offer = make_offer(store)
    inbox.offer("d1", offer, 0.0)
    for index in range(6):
        chunk(inbox, offer, index)
    (part,) = (tmp_path / "spool" / "parts").iterdir()
    part.unlink()
    commands, update = inbox.fin("d1", fin(offer), 0.0)
    assert ([answer.code for answer in said(commands, DOWN)], update) == (["digest"], None)
    assert receive(inbox, offer).path.read_bytes() == CONTENT


ACTS = st.one_of(
    st.tuples(st.just("offer"), st.sampled_from([1024, 2048])),
    st.tuples(st.just("chunk"), st.integers(0, 6), st.booleans()),
    st.tuples(st.just("fin"), st.sampled_from(["accept", "refuse"])),
    st.tuples(st.sampled_from(["rest", "end", "restart"])),  # all chunks, so that it can be complete; of the round
)


class Spooling:
    """A server, and devices that all offer the same."""

    def __init__(self, folder, store) -> None:
        self.folder, self.store, self.recorded = folder, store, set()
        self.counts = False  # an update in the present round
        self.offers = {}
        self.restart()

    def restart(self) -> None:
        self.spool = BlobStore(self.folder, durable=False)
        self.inbox = Inbox(TOPICS, self.spool, 10_000, self.recorded.__contains__)

    def end(self) -> None:
        self.inbox.clear("stale", "the round is over")
        self.spool.forget(())
        self.counts = False

    def act(self, device: str, what: str, *how):
        """What the device hears, and what arrived of it."""
        offer = self.offers.setdefault(device, make_offer(self.store, device))
        match what, *how:
            case "offer", chunk_bytes:
                manifest = self.store.manifest(offer.manifest.blob.id, chunk_bytes)
                self.offers[device] = offer.model_copy(update={"manifest": manifest})
                return self.inbox.offer(device, self.offers[device], 0.0)
            case "chunk", index, sound:
                data = self.store.chunk(offer.manifest, index) if sound else b"junk"
                return self.inbox.chunk(UpdateChunk(device, "w0", offer.contribution, index), data, 0.0)
            case ("rest",):
                return [self.act(device, "chunk", index, True) for index in range(len(offer.manifest.digests))]
            case "fin", verdict:
                commands, update = self.inbox.fin(device, fin(offer), 0.0)
                return commands, self.judge(update, verdict) if update else None

    def judge(self, update: ReceivedUpdate, verdict: str):
        content, contribution = update.path.read_bytes(), update.offer.contribution
        if verdict == "refuse":
            return content, self.inbox.refuse(update.device, contribution, "content", "bad")
        self.spool.adopt(update.path)
        self.counts = True
        self.recorded.add(contribution)
        return content, self.inbox.accept(contribution)


@settings(max_examples=60, deadline=None)
@given(acts=st.lists(st.tuples(st.sampled_from(["d1", "d2", "d3"]), ACTS), max_size=30))
def test_whoever_offers_the_same_each_device_hears_what_it_would_hear_alone(tmp_path_factory, acts):
    folder = tmp_path_factory.mktemp("equal")
    store = BlobStore(folder / "device", durable=False)
    together, alone = Spooling(folder / "together", store), {name: Spooling(folder / name, store) for name in ("d1", "d2", "d3")}
    for device, (what, *how) in acts:
        if what in ("end", "restart"):
            for one in (together, *alone.values()):
                getattr(one, what)()
        else:
            assert together.act(device, what, *how) == alone[device].act(device, what, *how)
        if together.counts:
            assert together.spool.read(hashlib.sha256(CONTENT).hexdigest()) == CONTENT
    shutil.rmtree(folder)


def test_the_end_of_a_round_refuses_what_is_under_way_but_not_what_arrived(inbox, store):
    update = receive(inbox, make_offer(store, "d1"))
    for device in ("d2", "d3", "d4"):
        inbox.offer(device, make_offer(store, device, content=device.encode()), 0.0)
    refusals = said(inbox.clear("stale", "the round is over"), DOWN)
    assert [refusal.code for refusal in refusals] == ["stale"] * 3
    assert len(inbox.accept(update.offer.contribution)) == 1
