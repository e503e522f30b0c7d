import ssl

import pytest

from lwfed.edge_agent.events import EndWorker, StartWorker, Stop
from lwfed.edge_agent.facts import MemoryFacts
from lwfed.edge_agent.journal import Journal, Seen
from lwfed.edge_agent.session import SAVE_BYTES, SAVE_S, TrafficCount
from lwfed.errors import Forbidden, InvalidMessage, ProtocolMismatch, Refused, Unreachable
from lwfed.transport.address import BrokerAddress
from lwfed.transport.base import Disconnected
from lwfed.transport.memory import MemoryTransport
from lwfed.transport.mqtt_errors import explain_failure
from lwfed.wire import messages
from lwfed.wire.messages import Challenge, Hello, State
from lwfed.wire.report import Traffic
from lwfed.wire.topics import Topics

TOPICS = Topics("default")
MARK = b" signed"


def seal(announcement):
    return announcement + MARK


def believe(payload):
    """What a verifier does, without its cryptography, which tests/wire/test_signed.py tests."""
    if not payload.endswith(MARK):
        raise InvalidMessage("not signed")
    return payload.removesuffix(MARK)


def state(world):
    return messages.decode(State, world.broker.retained[TOPICS.from_device(world.device.id, "state")])


def test_it_greets_the_server_and_says_that_it_is_ready(world):
    server, device = world.joined()
    assert server.greeted == [device.id]
    assert server.of(Hello)[0].start == device.start
    assert (state(world).state, state(world).start) == ("ready", device.start)


def test_it_answers_who_asks_for_others_of_its_identity_by_a_greeting(world):
    server, device = world.joined()
    for rival in ("00ba11ad00ba11ad", device.start.nonce):  # which it is itself
        server.send(device.id, Challenge(rival=rival))
    world.settle()
    assert [hello.rival for hello in server.of(Hello)] == [None, "00ba11ad00ba11ad"]
    assert {hello.start for hello in server.of(Hello)} == {device.start}


def test_it_waits_for_a_server_and_says_so_once(world):
    device = world.start_device()
    world.settle(20)
    assert len(device.texts("server")) == 1
    world.start_server()
    world.settle()
    assert world.server.greeted == [device.id]


def test_it_greets_again_after_a_reconnection_and_after_a_restart_of_the_server(world):
    server, device = world.joined()
    world.broker.cut(device.id)
    world.settle()
    assert server.greeted == [device.id] * 2
    world.kill_server()
    world.settle()
    assert device.texts("server")[-1] == "the server is offline; waiting for it"
    again = world.start_server(epoch=2)
    world.settle()
    assert again.greeted == [device.id]


@pytest.mark.parametrize("believe", [believe, None], ids=["enrolled", "not enrolled"])
def test_a_device_that_may_do_nothing_any_more_says_why_that_may_be(world, believe):
    device = world.start_device(believe=believe)
    world.settle()
    for reason in (Refused("the session was ended"), Forbidden("no topics"), Forbidden("no topics"), Unreachable("gone")):
        device.queue.append(Disconnected(reason))
        world.settle()
    first, second = device.texts("disconnected")
    assert "the session was ended" in first
    assert ("no topics" in second, "revoked" in second) == (True, believe is not None)


@pytest.mark.parametrize("believe", [believe, None], ids=["enrolled", "not enrolled"])
def test_another_authority_than_that_of_the_enrolment_is_named_by_no_option(world, believe):
    device = world.start_device(believe=believe)
    world.settle()
    device.queue.append(Disconnected(explain_failure(ssl.SSLCertVerificationError(), BrokerAddress("garden.local", 8883, tls=True), 1.0)))
    world.settle()
    (text,) = device.texts("disconnected")
    assert ("is this the right server?" in text, "--ca" in text) == (believe is not None, believe is None)


@pytest.mark.parametrize("early", [False, True], ids=["the server is there", "before the server's state"])
def test_an_enrolled_device_follows_what_its_server_has_signed_and_nothing_else(world, early):
    server = world.start_server()
    if early:
        server.announce(run="forged")
    device = world.start_device(believe=believe)
    world.settle()
    server.announce(run="forged")
    server.assign(device.id, run="forged")
    world.settle(2)
    assert (device.texts("run"), device.worker, device.journal.seen) == ([], [], Seen(epoch=0, seq=0))
    assert any("not signed" in text for text in device.texts("warning"))
    server.announce(run="true", sealed=seal)
    server.assign(device.id, run="true")
    world.settle(2)
    assert [text.split(":")[0] for text in device.texts("run")] == ["run true"]
    assert device.worker == [StartWorker(1)]


def test_an_enrolled_device_is_led_back_to_no_announcement_of_long_ago(world):
    server, device = world.start_server(epoch=5), world.start_device(believe=believe)
    server.announce(run="old", sealed=seal)
    repeated = world.broker.retained[TOPICS.run]
    world.kill_server()
    server = world.start_server(epoch=7)
    server.announce(run="new", sealed=seal)
    world.settle()
    server.link.publish(TOPICS.server_state, messages.encode(messages.ServerState(online=True, epoch=5)), retain=True)
    server.link.publish(TOPICS.run, repeated, retain=True)
    world.settle()
    assert device.journal.seen.epoch == 7
    assert [text.split(":")[0] for text in device.texts("run")] == ["run old", "run new"]
    assert "start 5, and 7 has announced a run: it is repeated by somebody" in device.texts("warning")[-1]


def test_no_first_connection_within_the_wait_ends_with_the_reason(world):
    world.broker.stop()
    device = world.start_device(wait_s=15)
    device.queue.append(Disconnected(Unreachable("nobody at broker:1883")))
    world.settle(14)
    assert device.exit is None
    world.settle(2)
    assert isinstance(device.exit.error, Unreachable)
    assert "broker:1883" in str(device.exit.error)


def test_refused_credentials_end_it_at_once_but_only_before_the_first_success(world):
    device = world.start_device()
    world.settle(0.2)
    device.queue.append(Disconnected(Refused("wrong password")))
    world.settle(60)
    assert device.exit is None
    world.broker.stop()
    other = world.start_device()
    other.queue.append(Disconnected(Refused("wrong password")))
    world.settle(0.1)
    assert isinstance(other.exit.error, Refused)


def test_an_outage_is_said_once_and_outlasted(world):
    _, device = world.joined()
    world.broker.stop()
    for _ in range(3):
        device.queue.append(Disconnected(Unreachable("still down")))
        world.settle()
    assert len(device.texts("disconnected")) == 1
    world.broker.start()
    world.settle()
    assert device.texts("joined")[-1] == "connected again"


def test_a_server_of_another_protocol_ends_it_with_advice(world):
    device = world.start_device()
    world.server = None
    payload = b'{"v": 9, "online": true, "epoch": 1, "protocol_min": 8, "protocol_max": 9, "new": 1}'
    link = world.broker.transport()
    link.open("newer", None, lambda event: None)
    link.publish(TOPICS.server_state, payload, retain=True)
    world.settle(0.2)
    assert isinstance(device.exit.error, ProtocolMismatch)
    assert "upgrade" in str(device.exit.error)


def test_other_messages_of_another_protocol_are_ignored_and_said_once(world):
    server, device = world.training()
    for payload in (b'{"v": 2}', b'{"v": 7, "run": "demo"}'):
        for topic in (TOPICS.run, TOPICS.to_device(device.id, "task"), TOPICS.to_device(device.id, "done")):
            server.link.publish(topic, payload)
    world.settle()
    assert device.exit is None
    assert len(device.texts("warning")) == 1
    assert "protocol version 2" in device.texts("warning")[0]
    device.finish()
    world.settle(2)
    assert server.received


def test_stop_ends_agent_and_worker(world):
    _, device = world.training()
    device.queue.append(Stop())
    world.settle(0.1)
    assert device.exit.error is None
    assert device.worker[-1] == EndWorker()


def test_what_does_not_parse_is_ignored_and_said_without_filling_the_log(world):
    server, device = world.joined()
    for _ in range(10):
        server.link.publish(TOPICS.run, b"{")
        server.link.publish(TOPICS.to_device(device.id, "task"), b'{"run": 3}')
    world.settle()
    assert device.exit is None
    assert len(device.texts("warning")) == 5


# Replays


def test_an_older_announcement_is_ignored(world):
    server, device = world.joined()
    server.announce(stage=2, seq=7)
    world.settle(0.2)
    server.announce(stage=1, seq=3)
    server.assign(device.id, stage=1)
    server.assign(device.id, stage=2)
    world.settle(2)
    assert device.texts("task") == ["stage 2, round 1: this device trains"]


def test_an_announcement_of_no_server_yet_does_not_drown_those_of_the_present_one(world):
    server, device = world.joined()
    server.epoch = 9
    server.announce(run="stray", seq=2**53 - 1)
    world.settle(0.2)
    server.epoch = 1
    server.announce(seq=1)
    server.assign(device.id)
    world.settle(2)
    assert device.worker == [StartWorker(1)]


def test_the_retained_announcement_is_obeyed_again_after_a_restart_of_the_agent(world):
    server, device = world.joined()
    server.announce()
    world.settle(0.2)
    device.kill()
    again = world.start_device()
    world.settle(0.2)
    server.assign(again.id)
    world.settle(2)
    assert again.worker == [StartWorker(1)]


def test_a_server_that_lost_its_state_is_followed(world):
    server, device = world.joined()
    server.epoch = 5
    server.link.publish(TOPICS.server_state, server.state(), retain=True)
    server.announce()
    world.settle(0.2)
    world.kill_server()
    fresh = world.start_server(epoch=1)
    fresh.announce()
    fresh.assign(device.id)
    world.settle(2)
    assert device.worker == [StartWorker(1)]


def test_the_late_will_of_an_older_server_is_ignored(world):
    server, device = world.joined()
    server.epoch = 2
    server.link.publish(TOPICS.server_state, server.state(), retain=True)
    world.settle(0.2)
    server.epoch = 1
    server.link.publish(TOPICS.server_state, server.state(online=False))
    world.settle(0.2)
    assert "offline" not in device.texts("server")[-1]


def lost(world, *suffixes):
    """From now on messages to topics that end so are."""
    world.broker.interfere = lambda client, topic, payload: 0 if topic.endswith(suffixes) else 1


def test_an_idle_device_greets_less_and_less_often_and_is_silent_otherwise(world):
    server, _ = world.joined()
    before = len(world.broker.log)
    world.settle(100)
    assert 2 <= len(server.greeted) <= 5
    world.settle(500)
    assert len(server.greeted) <= 7
    assert len(world.broker.log) - before == len(server.greeted) - 1


def test_a_server_whose_state_was_lost_is_found_all_the_same(world):
    lost(world, "srv/state")
    server, device = world.joined()
    world.settle(10)
    assert server.greeted == []
    world.broker.interfere = None
    world.settle(10)
    assert server.greeted == [device.id]


def test_a_server_that_is_back_is_found_when_that_was_lost(world):
    _, device = world.joined()
    world.kill_server()
    world.settle()
    lost(world, "srv/state")
    server = world.start_server(epoch=2)
    world.settle(9)
    world.broker.interfere = None
    world.settle(12)
    assert server.greeted == [device.id]
    assert device.texts("server").count("the server is offline; waiting for it") == 1


def test_a_greeting_that_was_lost_is_repeated(world):
    lost(world, "up/hello")
    server, device = world.joined()
    world.settle(10)
    world.broker.interfere = None
    assert server.greeted == []
    world.settle(10)
    assert server.greeted == [device.id]


@pytest.mark.parametrize(("limit", "said"), [(None, 0), (100_000, 0), (8000, 1)])
def test_a_broker_that_takes_too_small_packets_for_any_update_is_said_on_connecting(world, monkeypatch, limit, said):
    monkeypatch.setattr(MemoryTransport, "packet_limit", limit)
    _, device = world.joined()
    assert len(device.texts("warning")) == said
    assert all("8000 bytes" in text and "max_packet_size" in text for text in device.texts("warning"))


def test_a_server_whose_end_and_new_start_were_both_lost_is_asked_for_when_it_announces_a_round(world):
    _, device = world.joined()
    lost(world, "srv/state")
    world.kill_server()
    world.settle()
    server = world.start_server(epoch=2)
    world.settle(0.2)
    world.broker.interfere = None
    server.announce()
    server.assign(device.id)
    world.settle(2)
    assert device.worker == [StartWorker(1)]


# Traffic


class Wire:
    received_bytes = sent_bytes = 0


def test_bytes_are_counted_over_all_starts_however_the_agent_ends():
    link, facts = Wire(), MemoryFacts({})
    count = TrafficCount(Journal(facts), link)
    link.received_bytes, link.sent_bytes = 700, 50  # before there is an announcement
    count.poll(0.0)
    count.follow("demo")
    assert count.now() == Traffic(down=700, up=50)
    link.received_bytes += SAVE_BYTES
    count.poll(1.0)
    link.received_bytes += 2 * SAVE_BYTES
    count.poll(2.0)  # too soon after the last time
    killed = Journal(MemoryFacts(facts.held)).traffic("demo")
    assert killed == Traffic(down=700 + SAVE_BYTES, up=50)
    count.poll(1.0 + SAVE_S)
    link.received_bytes += SAVE_BYTES - 1
    count.poll(100.0)  # too little for a write
    facts = MemoryFacts(facts.held)
    again = TrafficCount(Journal(facts), Wire())
    again.follow("demo")
    assert again.now() == Traffic(down=700 + 3 * SAVE_BYTES, up=50)


def test_bytes_of_two_runs_are_told_apart():
    link, journal = Wire(), Journal(MemoryFacts({}))
    count = TrafficCount(journal, link)
    for run in ("first", "second", "first"):
        count.follow(run)
        link.received_bytes += 100
    count.save()
    assert [journal.traffic(run).down for run in ("first", "second")] == [200, 100]


def test_a_model_that_was_fetched_is_counted_although_the_agent_is_killed(world):
    _, device = world.training()
    device.kill()
    again = world.start_device()
    world.settle(0.2)
    assert again.journal.traffic("demo").down > 35_000
