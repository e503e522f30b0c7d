"""The faults of the broker in memory; what it shares with other transports is in `tests/contract`."""

from __future__ import annotations

import pytest

from lwfed.errors import Unreachable
from lwfed.transport.base import Connected, Disconnected, Received, Will
from lwfed.transport.memory import Faults, MemoryBroker


class Ear:
    def __init__(self, broker: MemoryBroker, name: str, *filters: str, will: Will | None = None) -> None:
        self.events = []
        self.transport = broker.transport()
        for filter in filters:
            self.transport.subscribe(filter)
        self.transport.open(name, will, self.events.append)

    @property
    def payloads(self) -> list[bytes]:
        return [event.payload for event in self.events if isinstance(event, Received)]


def hundred(faults: Faults | None) -> list[int]:
    broker = MemoryBroker(faults)
    ear, mouth = Ear(broker, "ear", "#"), Ear(broker, "mouth")
    for number in range(100):
        mouth.transport.publish("x", bytes([number]))
    broker.pump()
    return [payload[0] for payload in ear.payloads]


def test_without_faults_everything_arrives_in_order():
    assert hundred(None) == list(range(100))


def test_faults_are_the_same_for_the_same_seed():
    chances = {"drop": 0.2, "duplicate": 0.2, "reorder": 0.5}
    first = hundred(Faults(1, **chances))
    assert first == hundred(Faults(1, **chances))
    assert first != hundred(Faults(2, **chances))


@pytest.mark.parametrize(
    ("chances", "check"),
    [
        ({"drop": 0.5}, lambda seen: 30 < len(seen) < 70 and seen == sorted(set(seen))),
        ({"duplicate": 0.5}, lambda seen: 130 < len(seen) < 170 and seen == sorted(seen)),
        ({"reorder": 0.5}, lambda seen: seen != sorted(seen) and sorted(seen) == list(range(100))),
    ],
)
def test_each_fault_does_what_it_says(chances, check):
    assert check(hundred(Faults(3, **chances)))


def test_a_script_decides_what_arrives():
    broker = MemoryBroker()
    broker.interfere = lambda client, topic, payload: {b"lost": 0, b"twice": 2}.get(payload, 1)
    ear, mouth = Ear(broker, "ear", "#"), Ear(broker, "mouth")
    for payload in (b"lost", b"twice", b"once"):
        mouth.transport.publish("x", payload)
    broker.pump()
    assert ear.payloads == [b"twice", b"twice", b"once"]
    assert [payload for _, _, payload in broker.log] == [b"lost", b"twice", b"once"]


def test_a_cut_loses_what_is_under_way_and_sends_the_will():
    broker = MemoryBroker()
    watcher = Ear(broker, "watcher", "will")
    victim, mouth = Ear(broker, "victim", "x", will=Will("will", b"gone")), Ear(broker, "mouth")
    broker.pump()
    mouth.transport.publish("x", b"lost")
    broker.cut("victim", reconnect=False)
    mouth.transport.publish("x", b"not there")
    broker.pump()
    assert watcher.payloads == [b"gone"]
    assert broker.retained == {"will": b"gone"}
    assert isinstance(victim.events[-1], Disconnected)
    broker.restore("victim")
    mouth.transport.publish("x", b"back")
    broker.pump()
    assert victim.payloads == [b"back"]
    assert [type(event) for event in victim.events] == [Connected, Disconnected, Connected, Received]


def test_a_dead_broker_forgets_everything():
    broker = MemoryBroker()
    ear = Ear(broker, "ear", "#", will=Will("will", b"never"))
    ear.transport.publish("state", b"kept", retain=True)
    broker.pump()
    broker.stop()
    broker.pump()
    assert isinstance(ear.events[-1].reason, Unreachable)
    assert (ear.transport.pending, broker.retained) == (0, {})
    ear.transport.publish("state", b"dropped")
    broker.start()
    broker.pump()
    assert isinstance(ear.events[-1], Connected)
    assert ear.payloads == [b"kept"]


def test_an_empty_retained_message_clears():
    broker = MemoryBroker()
    mouth = Ear(broker, "mouth")
    for payload in (b"x", b""):
        mouth.transport.publish("state", payload, retain=True)
    assert broker.retained == {}


def test_a_second_client_of_the_same_name_takes_over():
    broker = MemoryBroker()
    first = Ear(broker, "name", "#", will=Will("will", b"gone"))
    second = Ear(broker, "name", "#")
    broker.pump()
    assert isinstance(first.events[-1], Disconnected)
    assert isinstance(second.events[0], Connected)
    first.transport.close()
    second.transport.publish("x", b"still here")
    broker.pump()
    assert second.payloads[-1] == b"still here"


def test_pump_can_be_stopped_in_the_middle():
    broker = MemoryBroker()
    ear = Ear(broker, "ear", "#")
    for _ in range(5):
        ear.transport.publish("x", b"")
    assert broker.pump(4) == 4
    assert broker.pump() == 1 + 10 - 4
    assert broker.pump() == 0


@pytest.mark.parametrize("filter", ["a/b/c", "a/b/+", "a/+/c", "a/#", "+/b/c"])
def test_a_subscription_counts_from_its_beginning_to_its_end(filter):
    broker = MemoryBroker(log_length=0)
    ear, mouth = Ear(broker, "ear"), Ear(broker, "mouth")
    for number, change in enumerate((lambda _: None, ear.transport.subscribe, ear.transport.unsubscribe, ear.transport.subscribe)):
        change(filter)
        mouth.transport.publish("a/b/c", bytes([number]))
        mouth.transport.publish("a/b", b"another")
    broker.pump()
    ear.transport.close()
    mouth.transport.publish("a/b/c", b"late")
    broker.pump()
    assert [payload for payload in ear.payloads if payload != b"another"] == [b"\x01", b"\x03"]
    assert not broker.log


def test_subscribers_get_a_message_in_the_order_of_their_opening_and_once():
    broker, heard = MemoryBroker(), []
    for name, filters in (("first", ["a/#", "a/b"]), ("second", ["a/b"]), ("third", ["a/+"])):
        link = broker.transport()
        for filter in filters:
            link.subscribe(filter)
        link.open(name, None, lambda event, name=name: heard.append(name) if isinstance(event, Received) else None)
    broker.transport().open("mouth", None, lambda event: None)
    broker._clients["mouth"].publish("a/b", b"x")
    broker.pump()
    assert heard == ["first", "second", "third"]


def test_a_delayed_message_arrives_at_its_time_and_may_be_overtaken():
    now = 0.0
    broker = MemoryBroker(Faults(4, delay_s=10.0), clock=lambda: now)
    ear, mouth = Ear(broker, "ear", "x"), Ear(broker, "mouth")
    for number in range(20):
        mouth.transport.publish("x", bytes([number]))
    broker.pump()
    due = broker.next_delivery
    assert ear.payloads == []
    assert 0 < due < 10
    now = due
    broker.pump()
    assert len(ear.payloads) == 1
    now = 10.0
    broker.pump()
    seen = [payload[0] for payload in ear.payloads]
    assert sorted(seen) == list(range(20)) != seen
    assert broker.next_delivery is None


def test_what_is_delayed_is_lost_with_its_connection():
    now = 0.0
    broker = MemoryBroker(Faults(4, delay_s=10.0), clock=lambda: now)
    ear, mouth = Ear(broker, "ear", "x"), Ear(broker, "mouth")
    mouth.transport.publish("x", b"late")
    broker.cut("ear")
    now = 10.0
    broker.pump()
    assert ear.payloads == []


def test_a_stalled_link_holds_up_both_directions_unnoticed():
    broker = MemoryBroker()
    ear, other = Ear(broker, "ear", "to/ear"), Ear(broker, "other", "from/ear")
    broker.pump()
    ear.events.clear()
    broker.stall("ear")
    ear.transport.publish("from/ear", b"out")
    other.transport.publish("to/ear", b"in")
    broker.pump()
    assert (ear.events, other.payloads, ear.transport.pending) == ([], [], 1)
    broker.resume("ear")
    broker.pump()
    assert (ear.payloads, other.payloads, ear.transport.pending) == ([b"in"], [b"out"], 0)


def test_a_stalled_link_that_is_cut_loses_what_it_held():
    broker = MemoryBroker()
    ear, other = Ear(broker, "ear", "to/ear", will=Will("from/ear", b"lost")), Ear(broker, "other", "from/ear")
    broker.pump()
    broker.stall("ear")
    ear.transport.publish("from/ear", b"out")
    other.transport.publish("to/ear", b"in")
    broker.cut("ear")
    broker.pump()
    assert (ear.payloads, other.payloads) == ([], [b"lost"])
    assert ear.transport.connected


def test_a_cut_without_a_will_and_a_broker_that_keeps_what_is_retained():
    broker = MemoryBroker()
    ear, other = Ear(broker, "ear", will=Will("state", b"lost")), Ear(broker, "other", "state")
    ear.transport.publish("state", b"there", retain=True)
    broker.cut("ear", will=False)
    broker.pump()
    assert other.payloads == [b"there"]
    broker.stop(persistent=True)
    broker.start()
    broker.pump()
    assert other.payloads == [b"there", b"there"]
