"""Devices that cannot train: when they are asked again, and when never."""

import numpy as np
import pytest

from lwfed.wire.messages import Fail

from .fleets import of


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


def test_a_start_is_known_by_its_greeting_alone(world, said):
    fleet, poor = after_a_round_without(world, said, 0.5, "unfit")
    fleet.broker.interfere = lambda client, topic, payload: 0 if topic.endswith("/d/poor/up/state") else 1
    poor.restart()
    fleet.finish()
    assert poor.tasks[-1] == (2, 2)


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


@pytest.mark.parametrize(("code", "attempts"), [("memory", 2), ("worker", 1), ("unfit", 1)])
def test_a_failure_that_arrives_again_after_its_device_was_started_again_counts_no_second_time(world, code, attempts):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("late", fails=attempts, code=code)
    fleet.settle(until=lambda: len(device.tasks) == attempts and device.task is None)
    fleet.quiet()
    late = Fail(run=device.run.run, stage=1, round=1, code=code, reason=f"out of {code}", attempt=attempts)
    device.restart()
    fleet.settle(until=lambda: not fleet.course.state.failed and not fleet.course.state.unfit)
    device.tell("fail", late)
    fleet.finish()
    assert fleet.now < 30
    assert len(device.tasks) == attempts + 4


def test_a_server_that_was_killed_knows_whom_it_has_asked_once_more(world):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("short", fails=2)
    fleet.settle(until=lambda: len(device.tasks) == 2)
    fleet.kill()
    fleet.start()
    assert fleet.course.state.retried == (0,)
    fleet.finish()
    assert fleet.now >= 100


def test_a_second_lack_of_memory_is_not_told_as_the_first_by_a_server_that_was_killed_between_them(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.bring("short", fails=2)
    while not fleet.course.state.retried:
        fleet.step()
    assert len(device.tasks) == 1
    fleet.kill()
    fleet.start()
    fleet.finish()
    assert [text.partition(" (")[0] for text in warnings(said) if text.startswith("device 0 ")] == [
        "device 0 ran out of memory: out of memory; it is asked once more, to take less",
        "device 0 cannot train in this round",
    ]


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
