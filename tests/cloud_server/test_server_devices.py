"""The server and devices that lie, fail, leave, come back, or are two."""

import json
from random import Random

import numpy as np
import pytest

from lwfed.blobs import BlobStore
from lwfed.cloud_server import fleet as fleet_module
from lwfed.cloud_server import server
from lwfed.cloud_server.fleet import REMIND_S
from lwfed.cloud_server.overview import overview
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


def test_a_device_whose_last_will_is_lost_too_is_missed_in_the_end(world, said):
    """As with a broker that is down when the device ends: what it retains says for ever that the device is there."""
    fleet = world("rounds.min_devices=2", "rounds.quorum=1.0", "rounds.deadline_s=600")
    fleet.start()
    for name in ("a", "b", "c"):
        fleet.join(name)
    fleet.settle(until=lambda: of(said, "round", status="closed", round=1))
    fleet.broker.cut("c", reconnect=False, will=False)
    fleet.settle(until=lambda: of(said, "device", status="does not answer; it may return"))
    (lost,) = of(said, "device", status="does not answer; it may return")
    assert lost["device"] == "c"
    assert fleet.course.state.devices[2] == "away"
    fleet.settle(until=lambda: of(said, "round", status="closed", round=2))
    fleet.broker.restore("c")
    fleet.finish()
    assert of(said, "device", status="is back")[-1]["device"] == "c"


def test_who_answers_is_missed_by_nobody_however_long_it_takes(world, said):
    fleet = world("rounds.min_devices=2", "rounds.deadline_s=86400")
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name, takes=lambda stage, round: 1000.0)
    fleet.finish()
    assert not of(said, "device", status="does not answer; it may return")


def test_an_agent_that_starts_again_is_no_second_one(world, said):
    fleet = undisturbed(world)
    device = fleet.devices[0]
    first = device.start
    fleet.broker.cut(device.name)
    fleet.quiet()
    device.restart()
    fleet.quiet()
    device.tell("state", messages.State(state="lost", start=first))
    fleet.kill()
    fleet.broker.retained["lwfed/default/d/a/up/state"] = messages.encode(messages.State(state="ready", start=first))  # before a power cut
    fleet.start()
    fleet.finish()
    assert of(said, "warning") == []
    assert {device.doubled_s for device in fleet.course.store.devices()} == {None}


@pytest.mark.parametrize("boot", [1, 2, 3], ids=["an earlier count", "the same count", "a later count"])
def test_two_agents_with_one_identity_are_noticed_and_the_run_goes_on(world, said, boot):
    fleet = undisturbed(world)
    agent = fleet.join("copied")
    agent.restart()
    fleet.quiet()
    copy = fleet.join("copied", boot=boot)
    for one in (agent, copy, agent):  # each throws the other out, as brokers do
        assert of(said, "warning", code="double") == []
        one.connect()
        fleet.quiet()
        if of(said, "warning", code="double"):
            break
    (warning,) = of(said, "warning")
    assert "two agents are device 2 (copied)" in warning["text"]
    assert "delete its --state" in warning["text"]
    assert [device.doubled_s is not None for device in fleet.course.store.devices()] == [False, False, True]
    assert "two agents were this device at " in overview(fleet.root / "server")
    fleet.finish()


def test_more_than_two_agents_with_one_identity_are_noticed(world, said):
    fleet = undisturbed(world, "rounds.min_devices=4")
    agents = [fleet.join("copied") for _ in range(3)]
    assert of(said, "warning") == []
    agents[0].connect()
    fleet.quiet()
    assert [one["code"] for one in of(said, "warning")] == ["double"]


@pytest.mark.parametrize("boot", [1, 2])
def test_a_device_whose_state_was_put_back_is_believed_and_no_second_one(world, said, boot):
    """As on a read-only disk, where each start is the first or second one."""
    fleet = undisturbed(world)
    agent = fleet.join("put-back")
    agent.restart()
    for _ in range(10):
        agent.tell("state", agent.state("stopped"), retain=True)
        agent.transport.close()
        fleet.quiet()
        agent = fleet.join("put-back", boot=boot)
        assert fleet.server._reception._fleet.members["put-back"].start == agent.start
    fleet.finish()
    assert of(said, "warning", code="double") == []


def test_what_earlier_starts_said_makes_no_second_one_however_late_doubled_or_out_of_order_it_comes(world, said):
    fleet = undisturbed(world, "rounds.min_devices=4")
    agent = fleet.join("late")
    said_before, counts = [], Random(1)
    for _ in range(30):
        agent.greet()
        fleet.quiet()
        said_before += [payload for _, topic, payload in fleet.broker.log if topic.startswith("lwfed/default/d/late/up/")]
        fleet.broker.log.clear()
        agent.tell("state", agent.state("stopped"), retain=True)
        agent.boot = counts.randrange(4)  # put back, copied over, or none of that
        agent.restart()
        fleet.quiet()
        for payload in counts.choices(said_before, k=5):
            kind = "hello" if b"machine" in payload else "state"
            agent.transport.publish(f"lwfed/default/d/late/up/{kind}", payload)
        fleet.quiet()
        fleet.now += 10
    assert of(said, "warning", code="double") == []
    assert agent.start == fleet.server._reception._fleet.members["late"].start


def test_a_device_with_too_few_images_is_not_asked(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    poor = fleet.join("poor", images=3)
    assert fleet.course.state.phase == "waiting"
    fleet.join("rich")
    fleet.finish()
    assert poor.tasks == []
    assert "data.min_images is 8" in of(said, "warning")[0]["text"]


def after_a_round_without(world, said, quorum, code):
    """A fleet of which one device could not train in the first round; and that device."""
    fleet = world(f"rounds.quorum={quorum}")
    fleet.start()
    fleet.join("rich")
    poor = fleet.join("poor", fails=1, code=code)
    fleet.settle(until=lambda: of(said, "round", status="closed") != [])
    return fleet, poor


@pytest.mark.parametrize("code", ["data", "unfit"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_device_without_images_or_memory_is_left_out_until_it_starts_anew(world, said, restarted, code):
    fleet, poor = after_a_round_without(world, said, 0.5, code)
    assert f"device 1 cannot train in this round ({code}): out of {code}; it is not asked again" in of(said, "warning")[0]["text"]
    if restarted:
        poor.restart()
    fleet.finish()
    assert poor.tasks[-1] == ((2, 2) if restarted else (1, 1))
    assert fleet.now < 30
    assert len(of(said, "warning")) == 1


def test_a_server_that_was_killed_knows_which_devices_are_unfit(world, said):
    fleet, poor = after_a_round_without(world, said, 0.5, "unfit")
    fleet.kill()
    fleet.start()
    fleet.finish()
    assert poor.tasks == [(1, 1)]
    assert "device 1 is not asked to train: out of unfit" in of(said, "warning")[-1]["text"]


def test_a_device_without_images_holds_no_round_open_and_stays_one_when_it_connects_again(world, said):
    fleet, poor = after_a_round_without(world, said, 1, "data")
    assert fleet.now < 30
    fleet.broker.cut("poor")
    fleet.join("another")
    fleet.finish()
    assert poor.tasks == [(1, 1)]


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


def test_a_device_that_goes_for_good_is_not_waited_for_in_any_round(world, said):
    fleet = world("rounds.quorum=0.5")
    fleet.start()
    fleet.join("stays")
    goes = fleet.join("goes", spoil=lambda update: goes.tell("state", goes.state("stopped"), retain=True) or update)
    fleet.settle(until=lambda: of(said, "device", participant=1, status="has left") != [])
    fleet.devices.remove(goes)
    goes.transport.close()
    fleet.finish()
    assert [one["devices"] for one in of(said, "round", status="closed")] == [1] * 4
    assert fleet.now < 30  # neither a deadline nor the patience for those who may return


def test_a_lost_device_costs_its_round_until_the_deadline_only(world, said):
    fleet = world("rounds.quorum=0.5")
    fleet.start()
    fleet.join("stays")
    lost = fleet.join("lost")
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.devices.remove(lost)
    fleet.broker.cut("lost", reconnect=False)
    fleet.settle(until=lambda: of(said, "round", status="closed") != [])
    assert 100 <= fleet.now < 110
    fleet.finish()
    assert "has not come back" in " ".join(one["text"] for one in of(said, "warning"))


def test_a_device_that_goes_while_the_broker_is_down_holds_up_no_run(world):
    """The broker forgets it and says no word of it; there are others to train."""
    fleet = world("rounds.quorum=1.0", "rounds.sample=2")
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.join("c")
    lost = fleet.devices[0]
    fleet.broker.stop()
    fleet.devices.remove(lost)
    lost.transport.close()
    fleet.broker.start()
    fleet.finish()
    assert {one.participant for one in fleet.course.store.contributions()} == {1, 2}


def test_a_device_that_failed_is_asked_again_after_the_deadline(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("moody", fails=1, code="worker")
    fleet.settle(until=lambda: len(device.tasks) >= 2)
    assert fleet.now >= 100
    assert "out of worker" in of(said, "warning")[0]["text"]
    fleet.finish()


def warnings(said):
    return [one["text"].split("warning")[1].strip() for one in of(said, "warning")]


NEXT_TRY = "no device can train in this round: device 0 failed; the next try is in 100 s, or when one is mended and started again"


def test_a_device_that_was_mended_and_started_again_is_asked_at_once(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("mended", fails=1, code="worker")
    fleet.settle(until=lambda: len(device.tasks) == 1 and device.task is None)
    fleet.quiet()
    assert warnings(said)[1:] == [NEXT_TRY]
    device.restart()
    fleet.finish()
    assert fleet.now < 30
    assert len(device.tasks) == 5


def test_only_who_is_asked_no_more_has_to_be_mended_for_the_round(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("poor", fails=1, code="unfit")
    fleet.settle(until=lambda: len(device.tasks) == 1 and device.task is None)
    fleet.quiet()
    assert warnings(said)[1:] == ["no device can train in this round: device 0 is not fit for it; mend one and start it again"]


def test_a_device_that_ran_out_of_memory_is_asked_once_more_at_once(world, said):
    fleet = world("rounds.min_devices=2", "rounds.quorum=1")
    fleet.start()
    devices = [fleet.join(name, fails=1) for name in ("one", "other")]
    fleet.finish()
    assert fleet.now < 30
    assert [device.tasks for device in devices] == [[(1, 1), (1, 1), (1, 2), (2, 1), (2, 2)]] * 2
    assert warnings(said) == [
        f"device {number} ran out of memory: out of memory; it is asked once more, to take less (said once in a round)" for number in (0, 1)
    ]


def test_a_device_that_runs_out_of_memory_twice_counts_as_failed_until_the_deadline(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("short", fails=3)
    fleet.settle(until=lambda: len(device.tasks) == 2 and device.task is None)
    fleet.quiet()
    assert warnings(said)[1:] == [NEXT_TRY]
    fleet.settle(until=lambda: len(device.tasks) >= 3)
    assert fleet.now >= 100
    fleet.settle(until=lambda: len(device.tasks) >= 4)
    assert fleet.now >= 200, "once more in the round, however long that is"
    fleet.finish()


def test_a_failure_that_arrives_twice_costs_its_device_no_attempt(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.bring("short", fails=1)
    tell = device.tell

    def tell_twice(kind, message, **options):
        for _ in range(2 if kind == "fail" else 1):
            tell(kind, message, **options)

    device.tell = tell_twice
    fleet.finish()
    assert fleet.now < 30
    assert device.tasks == [(1, 1), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert len(warnings(said)) == 1


def test_a_server_that_was_killed_knows_whom_it_has_asked_once_more(world):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("short", fails=2)
    fleet.settle(until=lambda: len(device.tasks) == 2)
    fleet.kill()
    fleet.start()
    assert fleet.course.state.retried == {0: 1}
    fleet.finish()
    assert fleet.now >= 100


def test_a_device_whose_update_was_refused_is_asked_again_when_it_was_started_again(world, said):
    fleet = world("transfer.codec=fp32", "rounds.min_devices=1")
    fleet.start()
    wrong = fleet.join("wrong", spoil=lambda update: {**update, "extra": np.zeros(1, np.float32)})
    fleet.settle(until=lambda: wrong.refusals != [])
    assert "device 0 was refused" in of(said, "warning")[-1]["text"]
    wrong.spoil = lambda update: update
    wrong.restart()
    fleet.finish()
    assert fleet.now < 30


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


def test_a_finished_run_that_is_served_again_says_nothing_of_devices_that_left_long_ago(world, said):
    fleet = undisturbed(world)
    fleet.finish()
    for device in fleet.devices:
        fleet.broker.cut(device.name, reconnect=False)
    fleet.devices.clear()
    fleet.kill()
    said.clear()
    fleet.start()
    fleet.quiet()
    assert of(said, "device") == []


def test_a_run_that_goes_on_says_which_of_its_devices_is_lost(world, said):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.kill()
    fleet.broker.cut("b", reconnect=False)
    del fleet.devices[1]
    said.clear()
    fleet.start()
    fleet.quiet()
    assert of(said, "device", participant=1, status="not seen again yet") != []


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


def test_a_device_that_falls_silent_is_said_to_be_lost(world, said):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.broker.cut("b", reconnect=False)
    fleet.quiet()
    assert of(said, "device", participant=1, status="is lost; it may return") != []


@pytest.mark.parametrize("restarted", [False, True])
def test_a_last_will_after_the_goodbye_does_not_bring_a_device_back(world, said, restarted):
    fleet = world()
    fleet.start()
    leaver = fleet.join("leaver")
    leaver.tell("state", leaver.state("stopped"), retain=True)
    fleet.quiet()
    if restarted:
        fleet.kill()
    leaver.tell("state", leaver.state("lost"), retain=True)
    leaver.transport.close()
    fleet.devices.clear()
    if restarted:
        fleet.start()
    fleet.quiet()
    assert fleet.course.state.devices == {0: "gone"}
    assert of(said, "device")[-1]["status"] == "has left"


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
