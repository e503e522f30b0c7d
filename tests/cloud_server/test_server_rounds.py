"""Rounds of a fleet in the real world: slow devices, absent ones, over-selection."""

import pytest

from lwfed.transport.memory import Faults

from .fleets import of

SLOW_S = 3000.0


def contributors(fleet):
    found = {}
    for one in fleet.course.store.contributions():
        found.setdefault((one.stage, one.round), set()).add(one.participant)
    return found


def closed(fleet, said, stage, round):
    fleet.settle(until=lambda: of(said, "round", status="closed", stage=stage, round=round) != [])
    return fleet.now


def test_a_device_slower_than_it_was_is_left_behind_told_and_asked_in_the_next_round(world, said):
    fleet = world("rounds.min_devices=3", "rounds.deadline_s=3600")
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name, takes=lambda stage, round: 10.0)
    moody = fleet.join("moody", takes=lambda stage, round: SLOW_S if (stage, round) == (1, 2) else 10.0)
    first = closed(fleet, said, 1, 1)
    assert closed(fleet, said, 1, 2) - first == pytest.approx(120, abs=5)
    fleet.finish()
    everybody = {0, 1, 2}
    assert contributors(fleet) == {(1, 1): everybody, (1, 2): {0, 1}, (2, 1): everybody, (2, 2): everybody}
    assert moody.tasks == [(1, 1), (1, 2), (2, 1), (2, 2)]
    (warning,) = [one for one in of(said, "warning") if "deadline" in one["text"]]
    assert warning["participant"] == 2
    assert "4 times the 10 s that it last took" in warning["text"]


def test_an_update_after_the_own_deadline_counts_while_the_round_is_open(world, said):
    fleet = world("rounds.min_devices=2", "rounds.quorum=1.0", "rounds.deadline_s=3600")
    fleet.start()
    fleet.join("a", takes=lambda stage, round: 10.0)
    fleet.join("late", takes=lambda stage, round: 500.0 if (stage, round) == (1, 2) else 10.0)
    fleet.finish()
    assert set(map(frozenset, contributors(fleet).values())) == {frozenset({0, 1})}


def over_selected(world, faults=None, seconds=(10.0, 20.0, 30.0)):
    """Three devices, of which two make a round; they are as fast as `seconds` say, each round another one."""
    settings = ("rounds.min_devices=3", "rounds.sample=2", "rounds.oversample=1.5", "rounds.deadline_s=3600")
    fleet = world(*settings, faults=faults)
    fleet.start()
    for number, name in enumerate(("a", "b", "c")):
        fleet.join(name, takes=lambda stage, round, number=number: seconds[(number + round + stage) % 3])
    return fleet, fleet.finish()


def test_the_first_of_more_chosen_devices_make_the_round_and_their_bits_alone_count(world, said):
    smooth, result = over_selected(world)
    slowest = {(stage, round): (2 - round - stage) % 3 for stage in (1, 2) for round in (1, 2)}
    assert contributors(smooth) == {place: {0, 1, 2} - {last} for place, last in slowest.items()}
    for number, device in enumerate(smooth.devices):
        assert device.tasks == [(1, 1), (1, 2), (2, 1), (2, 2)]  # the last is asked in the next round again
        assert device.sent == sum(last != number for last in slowest.values())
    faults = Faults(seed=4, drop=0.1, duplicate=0.1, reorder=0.2)
    rough, same = over_selected(world, faults, seconds=(20.0, 10.0, 4000.0))
    assert contributors(rough) == contributors(smooth)
    assert same == result


def test_an_update_that_is_on_its_way_when_the_round_closes_is_refused_with_the_reason(world, said):
    fleet = world("rounds.min_devices=3", "rounds.sample=2", "rounds.oversample=1.5", "rounds.deadline_s=3600")
    fleet.start()
    slow = fleet.join("slow")
    fleet.broker.interfere = lambda client, topic, payload: 0 if topic.endswith("slow/up/fin") else 1
    for name in ("a", "b"):
        fleet.join(name, takes=lambda stage, round: 20.0)
    closed(fleet, said, 1, 1)
    fleet.quiet()
    assert (slow.sent, slow.refusals) == (1, ["stale"])
    assert slow.tasks[-1] == (1, 2)
    fleet.broker.interfere = None
    fleet.finish()
    assert 0 in contributors(fleet)[1, 2]


def test_a_device_that_returns_within_the_round_is_asked_at_once(world, said):
    fleet = world("rounds.min_devices=2", "rounds.deadline_s=3600")
    fleet.start()
    fleet.join("a", takes=lambda stage, round: 600.0)
    fleet.join("b", takes=lambda stage, round: 600.0)
    fleet.settle(until=lambda: fleet.now > 100)
    b = fleet.devices.pop()
    fleet.broker.cut("b", reconnect=False)
    fleet.settle(until=lambda: fleet.now > 200)
    b.task = b.ready_at = None  # a power cut: what it was doing is lost
    b.begin()
    fleet.devices.append(b)
    fleet.broker.restore("b")
    before = fleet.now
    fleet.settle(until=lambda: b.task is not None)
    assert fleet.now - before < 1
    assert b.tasks == [(1, 1), (1, 1)]
    fleet.finish()
    assert contributors(fleet)[1, 1] == {0, 1}


def test_a_device_that_was_away_for_a_whole_stage_catches_up(world, said):
    fleet = world("rounds.min_devices=3", "stages.rounds_per_stage=3", "calibration.every=never")
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name, takes=lambda stage, round: 10.0)
    away = fleet.join("away", takes=lambda stage, round: 10.0)
    closed(fleet, said, 1, 1)
    fleet.devices.remove(away)
    fleet.broker.cut("away", reconnect=False)
    closed(fleet, said, 2, 1)  # and the next one has begun
    assert away.tasks[-1][0] == 1
    held = {path.name for path in (fleet.root / "away" / "held").iterdir()}
    frozen = {fleet.course.state.parts[part] for part in ("stem", "layer.1")}  # trained on while it was away
    assert not frozen & held
    fleet.broker.log.clear()
    fleet.devices.append(away)
    fleet.broker.restore("away")
    fleet.finish()
    everybody, others = {0, 1, 2}, {0, 1}
    assert contributors(fleet) == {
        (1, 1): everybody, (1, 2): others, (1, 3): others, (2, 1): others, (2, 2): others, (2, 3): everybody,
    }  # fmt: skip
    assert away.refusals == []
    fetched = {topic.split("/")[-2] for _, topic, _ in fleet.broker.log if "/blob/" in topic}
    assert frozen <= fetched
    assert not fetched & held


def test_updates_are_kept_no_longer_than_their_round(world):
    """Also where the next one begins at once, as all do that are not calibrated."""
    fleet = world("stages.rounds_per_stage=4", "calibration.every=never")
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name, takes=lambda stage, round: 10.0)
    folder, most = fleet.root / "server" / "updates", 0

    def until():
        nonlocal most
        most = max(most, sum(path.is_file() for path in folder.iterdir()))
        return fleet.course.state.over

    fleet.settle(until)
    assert most <= 2
    assert not any(path.is_file() for path in folder.iterdir())


def test_a_device_that_always_fails_stops_nobody(world, said):
    fleet = world("rounds.min_devices=3", "rounds.quorum=0.5", "rounds.deadline_s=3600")
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name, takes=lambda stage, round: 10.0)
    failing = fleet.join("failing", fails=99)
    fleet.finish()
    assert fleet.now < 60
    assert failing.tasks == [(1, 1), (1, 1), (1, 2), (1, 2), (2, 1), (2, 1), (2, 2), (2, 2)], "with less memory once more"
    assert set(map(frozenset, contributors(fleet).values())) == {frozenset({0, 1})}
