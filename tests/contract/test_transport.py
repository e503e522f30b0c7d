"""What every transport promises."""

from __future__ import annotations

from collections import Counter

from lwfed.errors import Unreachable
from lwfed.transport.base import Connected, Disconnected, Received, Sent, Will
from lwfed.transport.packets import publish_bytes

WINDOW = 8


def test_a_retained_message_reaches_who_comes_later(network):
    early = network.client().up()
    early.transport.publish(network.topic("state"), b"old", retain=True)
    early.transport.publish(network.topic("state"), b"new", retain=True)
    early.wait(lambda: early.count(Sent) == 2, "acknowledgements")
    late = network.client().up(None, network.topic("+"))
    late.wait(lambda: bool(late.received()), "the retained message")
    assert late.received() == [(network.topic("state"), b"new")]
    assert isinstance(late.events[0], Connected)


def test_it_is_known_what_the_broker_retains(network):
    early = network.client().up(None, network.topic("+"))
    early.transport.publish(network.topic("state"), b"stays", retain=True)
    early.transport.publish(network.topic("beat"), b"goes")
    early.wait(lambda: len(early.received()) == 2, "its own messages")
    late = network.client().up(None, network.topic("+"))
    late.wait(lambda: bool(late.received()), "the retained message")
    assert late.retained() == {b"stays"}
    old = getattr(early.transport, "protocol", "5") == "3.1.1"
    assert early.retained() == (set() if old else {b"stays"})


def test_wildcards_match_levels(network):
    listener = network.client().up(None, network.topic("d/+/up/#"))
    sender = network.client().up()
    for rest in ("other", "d/a/dn/x", "d/a/up/state", "d/b/up/w0/id/3"):
        sender.transport.publish(network.topic(rest), rest.encode())
    listener.wait(lambda: len(listener.received()) == 2, "two of four messages")
    assert {payload for _, payload in listener.received()} == {b"d/a/up/state", b"d/b/up/w0/id/3"}


def test_the_will_is_sent_after_a_cut_and_not_after_a_close(network):
    watcher = network.client().up(None, network.topic("#"))
    victim = network.client("victim").up(Will(network.topic("victim"), b"lost"))
    leaver = network.client("leaver").up(Will(network.topic("leaver"), b"lost"), network.topic("unused"))
    leaver.transport.close()
    victim.transport.reconnect()
    watcher.wait(lambda: bool(watcher.received()), "the will")
    victim.wait(lambda: victim.count(Connected) == 2, "the new connection")
    victim.transport.publish(network.topic("end"), b"")
    watcher.wait(lambda: (network.topic("end"), b"") in watcher.received(), "the last message")
    assert watcher.received() == [(network.topic("victim"), b"lost"), (network.topic("end"), b"")]


def test_the_will_is_retained(network):
    victim = network.client("victim").up(Will(network.topic("victim"), b"lost"))
    victim.transport.reconnect()
    victim.wait(lambda: victim.count(Connected) == 2, "the new connection")
    late = network.client().up(None, network.topic("victim"))
    late.wait(lambda: bool(late.received()), "the will")
    assert late.received() == [(network.topic("victim"), b"lost")]


def test_subscriptions_survive_a_reconnection(network):
    listener = network.client().up(None, network.topic("a"))
    listener.transport.subscribe(network.topic("b"))
    listener.transport.subscribe(network.topic("c"))
    listener.transport.unsubscribe(network.topic("c"))
    listener.transport.reconnect()
    listener.wait(lambda: listener.count(Connected) == 2, "the new connection")
    assert listener.count(Disconnected) >= 1, "a broker may refuse once while it still lets the old one go"
    sender = network.client().up()
    for rest in "cab":
        sender.transport.publish(network.topic(rest), rest.encode())
    listener.wait(lambda: len(listener.received()) == 2, "both messages")
    assert [payload for _, payload in listener.received()] == [b"a", b"b"]


def test_many_chunks_arrive_within_a_window(network):
    listener = network.client().up(None, network.topic("chunk/+"))
    sender = network.client().up()
    chunk = bytes(120 * 1024)
    for index in range(200):
        sender.wait(lambda: sender.transport.pending < WINDOW, "room in the window")
        sender.transport.publish(network.topic(f"chunk/{index}"), chunk)
    listener.wait(lambda: len(listener.received()) >= 200, "all chunks")
    sender.wait(lambda: sender.transport.pending == 0, "the last acknowledgement")
    topics = Counter(topic for topic, payload in listener.received() if payload == chunk)
    assert topics == {network.topic(f"chunk/{index}"): 1 for index in range(200)}
    assert sender.count(Sent) == 200


def test_bytes_are_counted_on_both_sides(network):
    listener = network.client().up(None, network.topic("x"))
    sender = network.client().up()
    payloads = [bytes(size) for size in (0, 100, 20_000)]
    for payload in payloads:
        sender.transport.publish(network.topic("x"), payload)
    listener.wait(lambda: len(listener.received()) == 3, "three messages")
    smallest = sum(publish_bytes(network.topic("x"), payload, version5=False) for payload in payloads)
    assert smallest <= sender.transport.sent_bytes <= smallest + 3
    assert listener.transport.received_bytes == sender.transport.sent_bytes
    assert listener.transport.sent_bytes == sender.transport.received_bytes == 0


def test_what_is_published_without_a_connection_is_dropped(network):
    sender = network.client()
    sender.transport.publish(network.topic("x"), b"before it was opened")
    listener = network.client().up(None, network.topic("x"))
    sender.up()
    assert sender.transport.pending == 0
    sender.transport.publish(network.topic("x"), b"now")
    listener.wait(lambda: bool(listener.received()), "a message")
    assert listener.received() == [(network.topic("x"), b"now")]


def test_close_sends_what_is_pending_and_may_be_repeated(network):
    listener = network.client().up(None, network.topic("x"))
    sender = network.client().up()
    sender.transport.publish(network.topic("x"), b"last words")
    sender.transport.close()
    sender.transport.close()
    listener.wait(lambda: bool(listener.received()), "the last words")
    sender.transport.publish(network.topic("x"), b"ghost")
    assert sender.count(Disconnected) == 0
    network.client().transport.close()


def test_a_broker_that_is_not_there_is_unreachable(network):
    client = network.client()
    client.transport = network.unreachable()
    client.open()
    if network.clients and hasattr(network, "broker"):
        network.broker.start()
        client.wait(lambda: client.count(Connected) == 1, "the broker")
        return
    client.wait(lambda: client.count(Disconnected) >= 1, "a failure")
    reason = client.failures()[0]
    assert isinstance(reason, Unreachable)
    assert "nothing listens at mqtt://127.0.0.1:" in str(reason)
    client.transport.close()


def test_events_come_in_order_over_reconnections(network):
    client = network.client().up()
    for count in (2, 3):
        client.transport.reconnect()
        client.wait(lambda count=count: client.count(Connected) == count, "a new connection")
    changes = [type(event) for event in client.events if not isinstance(event, Received | Sent)]
    assert changes == [Connected, Disconnected] * 2 + [Connected]
