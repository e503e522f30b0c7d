"""A broker that drops what it owes the server: messages of others, and acknowledgements of its own."""

import pytest

from lwfed.cloud_server.echo import AFTER, ASK_EVERY_S, SUSPECT_S, Echo
from lwfed.transport.base import Connected
from lwfed.wire.commands import Reconnect, Send
from lwfed.wire.retry import RECONNECT_EVERY_S
from lwfed.wire.topics import Topics

from .fleets import undisturbed

SERVER, TOPIC = "lwfed-default-server", Topics("default").echo


def flood(fleet, number=AFTER):
    for _ in range(number):
        fleet.devices[0].transport.publish("lwfed/default/d/a/up/nonsense", b"z")
    fleet.broker.pump()


def connections(fleet, monkeypatch):
    """When the server has connected since."""
    found = []
    handle = fleet.server.handle
    monkeypatch.setattr(fleet.server, "handle", lambda event: (isinstance(event, Connected) and found.append(fleet.now), handle(event)))
    return found


def test_a_server_that_the_broker_tells_nothing_more_connects_anew_and_the_run_goes_on(world, monkeypatch):
    fleet = undisturbed(world)
    found = connections(fleet, monkeypatch)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    flood(fleet)
    fleet.broker.drown(SERVER)
    since = fleet.now
    fleet.settle(until=lambda: found)
    assert SUSPECT_S <= found[0] - since <= SUSPECT_S + 2 * ASK_EVERY_S
    fleet.finish()
    assert len(found) == 1


def test_acknowledgements_that_never_come_are_found_too(world, monkeypatch):
    fleet = undisturbed(world)
    found = connections(fleet, monkeypatch)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.server._transport._pending += 3
    flood(fleet)
    fleet.settle(until=lambda: found)
    assert fleet.server._transport.pending == 0
    fleet.finish()


def test_a_flood_of_which_nothing_is_dropped_costs_no_connection(world, monkeypatch):
    fleet = undisturbed(world)
    found = connections(fleet, monkeypatch)
    for _ in range(20):
        flood(fleet)
        fleet.quiet()
        fleet.now += 1.0
    fleet.finish()
    assert found == []


class Link:
    published = pending = 0


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def echo(link):
    return Echo(Topics("default"), link, lambda text: None)


def polled(echo, link, seconds, leave_each_s=0):
    """What it wants within a time, in which so many messages a second are taken over by the broker."""
    kinds = []
    for now in range(seconds):
        link.pending = max(0, link.pending - leave_each_s)
        kinds += [(now, type(command)) for command in echo.poll(float(now))]
    return kinds


def test_it_asks_at_first_and_then_only_after_many_messages(echo, link):
    assert [kind for _, kind in polled(echo, link, 1)] == [Send]
    link.published = 1
    assert echo.hears(TOPIC)
    assert polled(echo, link, 100) == []
    for _ in range(AFTER):
        assert not echo.hears("lwfed/default/d/a/up/beat")
    assert [kind for _, kind in polled(echo, link, 1)] == [Send]


def test_a_broker_that_never_passes_it_on_is_said_so_of_and_asked_no_more(link):
    said = []
    echo = Echo(Topics("default"), link, said.append)
    for _ in range(5):
        echo.begin()
        polled(echo, link, 3)
    (text,) = said
    assert TOPIC in text
    assert polled(echo, link, 100) == []


def test_a_question_that_waits_on_a_slow_link_is_no_reason_to_connect_anew(echo, link):
    link.published = link.pending = 60
    assert {kind for _, kind in polled(echo, link, 59, leave_each_s=1)} == {Send}


def test_it_wants_a_new_connection_once_a_minute_at_most(echo, link):
    link.published = link.pending = 20
    times = [now for now, kind in polled(echo, link, 200) if kind is Reconnect]
    assert times == [pytest.approx(SUSPECT_S + RECONNECT_EVERY_S * turn, abs=ASK_EVERY_S) for turn in range(len(times))]
    assert len(times) >= 3
