"""What devices leave at the broker, and who takes it away."""

import pytest

from lwfed.cloud_server import litter
from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.enrolment import invite
from lwfed.cloud_server.gate import Gate, Place
from lwfed.cloud_server.limits import MESSAGES_AT_ONCE
from lwfed.cloud_server.registry import Registry
from lwfed.transport.base import Received

from .fleets import counted, of

JUNK = ("d/a/up/x/y/7", "d/a/up/hello", "d/a/up/x", "d/a/up/x/1/2/3/4", "enrol/a/up")


def kept(fleet, device):
    return {topic for topic in fleet.broker.retained if f"/d/{device}/" in topic}


@pytest.fixture
def registry(tmp_path):
    made = Registry(tmp_path)
    yield made
    made.close()


@pytest.fixture
def fleet(world, tmp_path, registry):
    gate = Gate(tmp_path, Place("localhost", 8883), "default")
    gate.advertise()
    made = world()
    made.start(gate=gate)
    for name in ("a", "b"):
        invite(Authority(tmp_path), registry, name)
        made.bring(name)
    made.quiet()
    yield made
    gate.close()


def test_a_device_can_leave_its_state_at_the_broker_and_nothing_else(fleet, said):
    before = set(fleet.broker.retained)
    assert kept(fleet, "a") == {"lwfed/default/d/a/up/state"}
    for topic in JUNK:
        fleet.devices[0].transport.publish(f"lwfed/default/{topic}", bytes(100_000), retain=True)
    fleet.quiet()
    assert set(fleet.broker.retained) == before
    texts = [one["text"] for one in of(said, "warning", code="retained")]
    assert [text.split(" leaves messages")[0].split()[-1] for text in texts] == ["a", "enrol.a"]
    assert counted(fleet)["a"] == {"retained": len(JUNK) - 1}


def test_what_was_left_while_the_server_was_away_is_cleared_when_it_connects(fleet):
    before = set(fleet.broker.retained)
    fleet.broker.cut("lwfed-default-server", reconnect=False)
    for topic in JUNK:
        fleet.devices[0].transport.publish(f"lwfed/default/{topic}", b"junk", retain=True)
    fleet.broker.pump()
    fleet.broker.restore("lwfed-default-server")
    fleet.quiet()
    assert set(fleet.broker.retained) == before


def test_what_is_too_much_to_be_remembered_is_found_once_more(fleet, monkeypatch):
    monkeypatch.setattr(litter, "MAX_FOUND_BYTES", 700)
    before = set(fleet.broker.retained)
    for index in range(100):
        fleet.devices[0].transport.publish(f"lwfed/default/d/a/up/x/y/{index}", b"junk", retain=True)
    fleet.settle(until=lambda: set(fleet.broker.retained) == before)


def test_what_the_broker_drops_of_it_is_looked_for_until_nothing_is_left(fleet):
    before = set(fleet.broker.retained)
    fleet.broker.interfere = lambda client, topic, payload: int(topic not in list(fleet.broker.retained)[10:])
    for index in range(100):
        fleet.devices[0].transport.publish(f"lwfed/default/d/a/up/x/y/{index}", b"junk", retain=True)
    fleet.settle(until=lambda: set(fleet.broker.retained) == before)


def test_a_device_that_keeps_leaving_does_not_make_the_server_look_all_the_time(fleet, monkeypatch):
    looks = []
    subscribe = fleet.server._transport.subscribe
    monkeypatch.setattr(fleet.server._transport, "subscribe", lambda filter: (looks.append(filter), subscribe(filter)))
    while fleet.now < 60.0:
        fleet.devices[0].transport.publish(f"lwfed/default/d/a/up/x/y/{len(looks)}", b"junk", retain=True)
        fleet.now += 0.3
        fleet.quiet()
    assert 30 <= len(looks) <= 61 + 5
    assert looks.count("lwfed/default/d/+/up/#") <= 5
    fleet.settle(until=lambda: looks[-1] == "lwfed/default/d/+/up/#")
    fleet.settle(until=lambda: fleet.server._litter.next_wakeup() is None)


def test_clearing_waits_until_the_broker_has_taken_all_else(fleet):
    server = fleet.server
    server._litter.takes(Received("lwfed/default/d/a/up/x/y/7", b"junk", retained=True))
    fleet.broker.stall("lwfed-default-server")
    for _ in range(litter.AHEAD):
        server._transport.publish("x", b"of more use")
    server.handle(None)
    assert server._transport.pending == litter.AHEAD
    fleet.broker.resume("lwfed-default-server")
    before = server._transport.published
    fleet.quiet()
    assert server._transport.published > before


def test_more_than_a_device_may_say_is_cleared_all_the_same(fleet):
    before = set(fleet.broker.retained)
    for index in range(2 * MESSAGES_AT_ONCE):
        fleet.devices[0].transport.publish(f"lwfed/default/d/a/up/hello{index}", b"junk", retain=True)
    fleet.broker.pump()
    assert fleet.server._queue.empty()
    fleet.quiet()
    assert set(fleet.broker.retained) == before


def test_nothing_is_kept_of_a_device_that_is_revoked(fleet, registry):
    fleet.broker.interfere = lambda client, topic, payload: not client.endswith("server")  # which hears nothing of it
    fleet.devices[0].transport.publish("lwfed/default/d/a/up/x/y/7", b"junk", retain=True)
    fleet.broker.pump()
    fleet.broker.interfere = None
    assert len(kept(fleet, "a")) == 2
    registry.revoke("a")
    fleet.now += 1.1
    fleet.settle(until=lambda: kept(fleet, "a") == set())
    fleet.broker.cut("a")  # its last will
    fleet.quiet()
    assert kept(fleet, "a") == set()
    assert kept(fleet, "b") == {"lwfed/default/d/b/up/state"}
