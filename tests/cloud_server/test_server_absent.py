"""Devices that leave, are lost, or only seem to be."""

import pytest

from .fleets import of, undisturbed


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
