"""One device, or two of one identity: starts that are no second agent, and agents that are."""

from random import Random

import pytest

from lwfed.cloud_server.overview import overview
from lwfed.wire import messages

from .fleets import of, undisturbed


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
