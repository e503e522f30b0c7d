"""A run that its operator pauses: orders from another process, over restarts, in virtual time."""

import signal
import time

import pytest

from lwfed.cloud_server import orders
from lwfed.cloud_server.orders import Order
from lwfed.cloud_server.overview import overview
from lwfed.cloud_server.server import Stop
from lwfed.errors import StateError
from lwfed.transport.base import Connected

from .fleets import of, undisturbed


def root(fleet):
    return fleet.root / fleet.state


def tell(fleet, do, now=False):
    """As the operator's command does, and then as a running server that looks for orders."""
    orders.give(root(fleet), Order(do=do, now=now))
    fleet.server.take_orders()
    fleet.quiet()


def test_a_paused_run_ends_its_round_and_is_silent_until_it_is_resumed_over_restarts(world, said):
    expected = undisturbed(world).finish()
    fleet = world()
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name, takes=lambda stage, round: 10.0)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    tell(fleet, "pause")
    assert fleet.course.state.phase == "training"
    assert of(said, "paused", paused=True, phase="training") != []
    fleet.settle(until=lambda: fleet.course.state.phase == "waiting")
    assert [device.run.paused for device in fleet.devices] == [True, True]
    fleet.kill()
    fleet.start()
    fleet.quiet()
    assert fleet.server.next_wakeup(fleet.now) is None
    fleet.broker.log.clear()
    fleet.now += 1e5
    fleet.quiet()
    assert list(fleet.broker.log) == []
    assert [device.tasks for device in fleet.devices] == [[(1, 1)], [(1, 1)]]
    tell(fleet, "resume")
    assert of(said, "paused", paused=False) != []
    assert fleet.finish() == expected


@pytest.mark.parametrize("killed", [False, True])
def test_a_round_that_is_withdrawn_is_finished_later_to_the_same_bits(world, said, killed):
    expected = undisturbed(world).finish()
    fleet = world()
    fleet.start()
    fleet.join("a", takes=lambda stage, round: 10.0)
    b = fleet.join("b", takes=lambda stage, round: 50.0)
    fleet.settle(until=lambda: fleet.course.state.contributed != {})
    tell(fleet, "pause", now=True)
    assert b.task is None  # it has stopped
    if killed:
        fleet.kill()
        fleet.start()
        fleet.quiet()
    assert (fleet.course.state.phase, set(fleet.course.state.contributed)) == ("waiting", {0})
    fleet.now += 1000
    tell(fleet, "resume")
    assert fleet.course.state.owing == (1,)
    fleet.settle(until=lambda: b.task is not None, limit=3)  # asked again at once
    assert fleet.finish() == expected
    assert [device.tasks.count((1, 1)) for device in fleet.devices] == [1, 2]


def test_an_update_for_a_round_that_is_withdrawn_is_refused_with_the_reason(world, said):
    fleet = world()
    fleet.start()
    fleet.join("a")
    fleet.broker.interfere = lambda client, topic, payload: 0 if topic.endswith("b/up/fin") else 1
    b = fleet.join("b")
    fleet.settle(until=lambda: b.sent == 1)
    tell(fleet, "pause", now=True)
    assert b.refusals[0] == "stale"
    fleet.broker.interfere = None
    tell(fleet, "resume")
    fleet.finish()
    assert {one.participant for one in fleet.course.store.contributions(1, 1)} == {0, 1}


def test_orders_to_a_server_that_is_down_are_obeyed_before_any_round_begins(world, said):
    fleet = world()
    fleet.start()
    fleet.quiet()
    fleet.kill()
    orders.give(root(fleet), Order(do="pause"))
    orders.give(root(fleet), Order(do="resume"))
    orders.give(root(fleet), Order(do="pause"))
    assert "3 orders wait for the server" in overview(root(fleet))
    fleet.start()
    fleet.server.take_orders()
    for name in ("a", "b"):
        fleet.join(name)
    assert (fleet.course.state.phase, fleet.course.state.paused) == ("waiting", True)
    assert orders.waiting(root(fleet)) == []
    assert f"no round begins until cloud-server resume --state {root(fleet)}" in overview(root(fleet))


def test_the_running_server_looks_for_orders_by_itself(world, said):
    fleet = world()
    fleet.start()
    orders.give(root(fleet), Order(do="pause"))
    for event in (Connected(), Stop()):
        fleet.server._queue.put(event)
    before = signal.getsignal(signal.SIGTERM)
    fleet.server.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert fleet.course.state.paused


def test_a_server_with_nothing_to_do_wakes_up_for_orders(world, said, monkeypatch):
    fleet = world()
    fleet.start()
    looks = []

    def look():
        looks.append(time.monotonic())
        if len(looks) == 3:
            fleet.server._queue.put(Stop())

    monkeypatch.setattr(fleet.server, "take_orders", look)
    monkeypatch.setattr(fleet.server, "_clock", time.monotonic)
    monkeypatch.setattr(orders, "LOOK_EVERY_S", 0.05)
    fleet.server.run()
    assert looks[2] - looks[0] >= 0.1


def test_what_is_no_order_is_said_and_dropped(world, said):
    fleet = world()
    fleet.start()
    fleet.quiet()
    folder = root(fleet) / orders.FOLDER
    folder.mkdir()
    (folder / "000000001.json").write_text('{"do": "sing"}')
    tell(fleet, "pause")
    (warning,) = of(said, "warning")
    assert "000000001.json holds no order" in warning["text"]
    assert fleet.course.state.paused
    assert list(folder.iterdir()) == []


def test_orders_are_kept_in_order_and_none_replaces_another(tmp_path):
    given = [Order(do="pause"), Order(do="resume"), Order(do="pause", now=True)]
    for one in given:
        orders.give(tmp_path, one)
    assert [orders.read(path) for path in orders.waiting(tmp_path)] == given
    orders.waiting(tmp_path)[0].unlink()
    orders.give(tmp_path, Order(do="resume"))
    assert [orders.read(path).do for path in orders.waiting(tmp_path)] == ["resume", "pause", "resume"]


def test_a_folder_that_takes_no_orders_is_named(tmp_path):
    (tmp_path / orders.FOLDER).write_text("")
    with pytest.raises(StateError, match="orders"):
        orders.give(tmp_path, Order(do="pause"))
