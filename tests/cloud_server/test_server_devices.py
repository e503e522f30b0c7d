"""What devices say to the server: updates, junk, offers, questions; and what it answers."""

import json

import numpy as np
import pytest

from lwfed.blobs import BlobStore
from lwfed.cloud_server import fleet as fleet_module
from lwfed.cloud_server import server
from lwfed.cloud_server.fleet import REMIND_S
from lwfed.cloud_server.rounds import State
from lwfed.config.schema import MAX_DEVICES
from lwfed.transport import base
from lwfed.wire import messages
from lwfed.wire.inbox import SILENCE_S
from lwfed.wire.upload import contribution_id

from .fleets import HELLO, of, undisturbed


def test_an_update_that_does_not_fit_is_refused_and_harms_nobody(world, said):
    def poisoned(update):
        return {name: np.full_like(value, np.nan) for name, value in update.items()}

    expected = None
    for spoil in (poisoned, lambda update: {**update, "extra": np.zeros(1, np.float32)}, lambda update: dict(list(update.items())[1:])):
        fleet = world("transfer.codec=fp32", "rounds.quorum=0.5", "rounds.min_devices=2")
        fleet.start()
        fleet.join("honest")
        liar = fleet.join("liar", spoil=spoil)
        result = fleet.finish()
        assert expected in (None, result)
        expected = result
        assert set(liar.refusals) <= {"content", "not_finite"}
        assert len(liar.refusals) == 4
        assert liar.tasks == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert {one.participant for one in fleet.course.store.contributions()} == {0}
        assert not list((fleet.root / "server" / "updates").glob("*-*"))
    assert of(said, "warning")


def test_an_update_larger_than_the_plan_allows_is_not_even_received(world):
    fleet = world("transfer.codec=fp32")
    fleet.start()
    fleet.join("honest")
    big = fleet.join("big", spoil=lambda update: {**update, "extra": np.zeros(100_000, np.float32)})
    fleet.settle(until=lambda: big.refusals != [])
    assert big.refusals == ["too_large"]


def test_malformed_messages_are_counted_said_once_and_ignored(world, said):
    fleet = world()
    fleet.start()
    device = fleet.join("odd")
    for payload in (b"\xff", b"{}", b"[" * 5000, b'{"v": 1, "blobs": 3}'):
        for kind in ("need", "offer", "fin", "beat", "fail", "nonsense"):
            device.transport.publish(fleet.server._topics.from_device("odd", kind), payload)
    fleet.quiet()
    assert len(of(said, "warning")) == 6
    fleet.join("even")
    fleet.finish()


def test_a_fleet_is_no_larger_than_what_each_contribution_may_store(world, said, monkeypatch):
    everybody = range(MAX_DEVICES)
    numbers = {one: 1234567.891 + one for one in everybody}
    state = State(
        devices=dict.fromkeys(everybody, "here"),
        chosen=tuple(everybody),
        contributed=dict.fromkeys(everybody, "ab" * 16),
        pace=numbers,
        asked=numbers,
    )
    assert len(state.to_json()) < 256_000
    monkeypatch.setattr(fleet_module, "MAX_DEVICES", 2)
    fleet = world()
    fleet.start()
    for name in ("d1", "d2", "d3"):
        fleet.join(name)
    (warning,) = of(said, "warning")
    assert "device d3 is one too many and gets no task" in warning["text"]
    assert sorted(fleet.server._fleet.members) == ["d1", "d2"]


def test_who_has_not_greeted_gets_nothing(world):
    fleet = world()
    fleet.start()
    fleet.join("d1")
    topics, stranger = fleet.server._topics, fleet.broker.transport()
    stranger.open("stranger", None, lambda event: None)
    need = messages.Need(blobs=(messages.Want(id=fleet.course.config_ref.id, missing=None),))
    stranger.publish(topics.from_device("stranger", "need"), messages.encode(need))
    stranger.publish(topics.update_chunk("stranger", "w0", "00" * 16, 0), b"junk")
    fleet.quiet()
    answers = {topics.to_device("stranger", kind) for kind in ("manifest", "wait")}
    assert [topic for _, topic, _ in fleet.broker.log if topic in answers] == []


def test_tasks_for_more_devices_than_the_transport_takes_wait_for_room(world, monkeypatch):
    monkeypatch.setattr(server, "SEND_AHEAD", 2)
    monkeypatch.setattr(server, "TASKS_AHEAD", 10)
    fleet = world("rounds.min_devices=40")
    fleet.start()
    fleet.quiet()
    transport, topics = fleet.server._transport, fleet.server._topics
    publish = transport.publish
    transport.publish = lambda *args, **options: publish(*args, **options) if transport.pending < 14 else None
    names = [f"d{number}" for number in range(40)]
    devices = fleet.broker.transport()
    devices.open("devices", None, lambda event: None)
    for name in names:
        devices.publish(topics.from_device(name, "hello"), messages.encode(HELLO))
    fleet.quiet()
    assert [topic for _, topic, _ in fleet.broker.log if topic.endswith("/task")] == [topics.to_device(name, "task") for name in names]
    assert fleet.now < REMIND_S


def test_a_device_of_another_version_is_told_so(world, said):
    fleet = world()
    fleet.start()
    device = fleet.join("old")
    device.transport.publish(fleet.server._topics.from_device("old", "hello"), json.dumps({"v": 2}).encode())
    fleet.quiet()
    assert device.refusals == ["version"]
    assert "protocol version 2" in of(said, "warning")[0]["text"]


def test_an_acknowledged_update_offered_again_is_acknowledged_again(world):
    fleet = world("rounds.quorum=1")
    fleet.start()
    first, _ = fleet.join("first"), fleet.join("second")
    fleet.settle(until=lambda: first.upload is not None and first.upload.state == "done")
    before = fleet.course.store.contributions()
    first.upload = type(first.upload)(first.topics, "first", first.upload._offer, first.spool, 3)
    fleet.settle(until=lambda: first.upload.state == "done")
    assert [one.id for one in fleet.course.store.contributions()][: len(before)] == [one.id for one in before]
    fleet.finish()
    assert len(fleet.course.store.contributions()) == 8


def test_a_complaint_is_told_once_in_each_round(world, said):
    fleet = world("rounds.quorum=0.5")
    fleet.start()
    fleet.join("good")
    device = fleet.join("odd")
    for round in (1, 2):
        fleet.settle(until=lambda round=round: fleet.course.state.round == round and fleet.course.state.phase == "training")
        for _ in range(3):
            device.transport.publish(fleet.server._topics.from_device("odd", "beat"), b"{}")
    fleet.finish()
    assert len(of(said, "warning")) == 2


@pytest.mark.parametrize(
    ("images", "source", "says"),
    [
        (10, "folder", "900 MB, 10 images)"),
        (1797, "digits", "900 MB, 1797 images of digits before the split)"),
        (0, "cifar10", "900 MB, images of cifar10)"),
    ],
)
def test_the_images_of_a_set_that_is_split_are_not_said_to_be_the_device_s(world, said, images, source, says):
    fleet = world()
    fleet.start()
    device = fleet.bring("a")
    device.tell("hello", HELLO.model_copy(update={"images": images, "source": source}))
    fleet.quiet()
    assert of(said, "device", status="joined")[0]["text"].endswith(says)


def test_a_chunk_that_was_damaged_on_the_way_is_said_once(world, said):
    fleet = world()
    fleet.start()
    fleet.join("good")
    device = fleet.join("garbled")
    garbled = []

    def interfere(client, topic, payload):
        if "/w0/" in topic and "/garbled/" in topic and len(garbled) < 3:
            garbled.append(topic)
            device.transport.publish(topic, b"junk")
            return 0
        return 1

    fleet.broker.interfere = interfere
    fleet.finish()
    (warning,) = of(said, "warning")
    assert "device garbled sent a chunk that does not fit its digest; it is asked for again" in warning["text"]


def test_a_task_is_repeated_until_it_is_begun(world):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    lost = []
    fleet.broker.interfere = lambda client, topic, payload: 0 if topic.endswith("dn/task") and not lost.append(topic) else 1
    device = fleet.join("deaf")
    fleet.settle(until=lambda: len(lost) == 3)
    assert 30 <= fleet.now < 31
    assert device.tasks == []
    fleet.broker.interfere = None
    fleet.finish()


def test_an_offer_that_waits_to_be_handled_needs_no_second_one(world):
    fleet = undisturbed(world)
    fleet.quiet()
    server, topics = fleet.server, fleet.server._topics

    def arrived(*messages):
        for topic, payload in messages:
            server._arrive(base.Received(topic, payload))
        return server.drain()

    offer, other = [(topics.from_device("a", "offer"), payload) for payload in (b"an offer", b"another")]
    assert arrived(offer, other, offer, offer) == 2
    assert arrived(offer) == 1
    got = topics.from_device("a", "got"), messages.encode(messages.Got(chunks=1))
    assert arrived(got, got) == 2


def test_nobody_loses_a_slot_for_what_the_server_has_not_handled_yet(world, make_report, tmp_path):
    fleet = world("transfer.upload_slots=1", "rounds.min_devices=9")
    fleet.start()
    for name in "ab":
        fleet.join(name)
    server, topics, updates = fleet.server, fleet.server._topics, BlobStore(tmp_path / "updates", durable=False)

    def granted():
        fleet.broker.pump()
        return [topic for _, topic, _ in fleet.broker.log if topic.endswith("/grant")]

    server._inbox.limit_bytes = 5000
    chunks = []
    for number, name in enumerate("ab"):
        manifest = updates.manifest(updates.put(name.encode() * 5000).id, 1024)
        contribution = contribution_id("run", 1, 1, name, manifest.blob.id)
        place = {"run": "run", "stage": 1, "round": 1, "participant": number}
        offer = messages.Offer(contribution=contribution, manifest=manifest, report=make_report(), **place)
        server._execute(server._inbox.offer(name, offer, fleet.now))
        chunks.append(base.Received(topics.update_chunk(name, "w0", contribution, 0), name.encode() * 1024))
    for late in (chunks[1], chunks[0]):
        server._arrive(late)
    fleet.now += SILENCE_S + 1
    assert granted() == [topics.to_device("a", "grant")]
    server.drain()
    assert granted() == [topics.to_device("a", "grant")]
    server.drain()
    fleet.now += SILENCE_S + 1
    server.handle(None)
    assert granted() == [topics.to_device("a", "grant"), topics.to_device("b", "grant")]
