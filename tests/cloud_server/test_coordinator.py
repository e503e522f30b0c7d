"""The course of a run as a pure function: its table, and invariants under any order of events."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.cloud_server.coordinator import (
    RETURN_S,
    Absent,
    Aggregated,
    Calibrated,
    CannotTrain,
    Contributed,
    Evaluated,
    Prepared,
    Present,
    Restarted,
    Started,
    TimeUp,
    advance,
)
from lwfed.cloud_server.rounds import Aggregate, Begun, Calibrate, Evaluate, Extended, IllegalEvent, Joined, Prepare, Rules, State, duty

RULES = Rules(
    seed=0, stages=2, rounds=(2, 2), min_devices=2, sample=None, quorum=0.5, deadline_s=100.0, calibrate="round", evaluate=True
)  # fmt: skip


def after(rules, state, *events, now=0.0):
    for event in events:
        state, _ = advance(rules, state, event, now)
    return state


def training(rules=RULES, devices=2):
    """The first round, begun with all devices there."""
    state = after(rules, State(), Prepared({"stem": "s1"}))
    if rules.evaluate:
        state = after(rules, state, Evaluated())
    return after(rules, state, *(Present(number) for number in range(devices)))


def fingerprint(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def work(state):
    """The event with which a duty ends: a function of the duty and the model."""
    match duty(state):
        case Prepare(stage):
            return Prepared({f"layer.{stage}": fingerprint("init", stage)})
        case Evaluate():
            return Evaluated()
        case Aggregate(stage, contributions):
            return Aggregated({f"layer.{stage}": fingerprint(state.parts, sorted(contributions.items()))})
        case Calibrate(stage, round):
            return Calibrated({f"layer.{stage}": fingerprint(state.parts, stage, round)})
    return None


def update_of(state, participant):
    return Contributed(participant, fingerprint(state.parts, state.stage, state.round, participant))


def test_phases_in_order():
    rules, state = RULES, State()
    phases = [state.phase]
    for event in (Prepared({"stem": "a"}), Evaluated(), Present(0), Present(1), Contributed(1, "x"), Contributed(0, "y")):
        state = after(rules, state, event)
        phases.append(state.phase)
    assert phases == ["preparing", "evaluating", "waiting", "waiting", "training", "training", "aggregating"]
    assert duty(state) == Aggregate(1, {0: "y", 1: "x"})
    state = after(rules, state, Aggregated({"stem": "b"}))
    assert (state.phase, state.parts) == ("calibrating", {"stem": "b"})
    state = after(rules, state, Calibrated({"stem": "c"}))
    assert (state.phase, state.round, state.parts) == ("training", 2, {"stem": "c"})


def test_without_calibration_and_evaluation_their_phases_are_left_out():
    rules = replace(RULES, calibrate="never", evaluate=False, rounds=1, stages=1)
    state = after(rules, training(rules), Contributed(0, "x"), Contributed(1, "y"), Aggregated({}))
    assert state.phase == "finished"


def test_calibration_at_the_end_of_a_stage_only():
    rules = replace(RULES, calibrate="stage")
    assert [rules.calibrates(round) for round in (1, 2)] == [False, True]


@pytest.mark.parametrize("event", [Prepared({}), Evaluated(), Aggregated({}), Calibrated({}), Contributed(7, "x"), CannotTrain(7, True)])
def test_an_illegal_event_names_event_and_place(event):
    with pytest.raises(IllegalEvent, match=rf"{type(event).__name__}.* in phase training of stage 1, round 1"):
        advance(RULES, training(), event, 0.0)


def test_a_second_update_of_a_device_is_illegal():
    state = after(RULES, training(), Contributed(0, "x"))
    with pytest.raises(IllegalEvent):
        advance(RULES, state, Contributed(0, "other"), 0.0)


def test_the_first_round_waits_for_its_devices_however_long():
    state = after(RULES, State(), Prepared({}), Evaluated(), Present(0))
    assert after(RULES, state, TimeUp(), TimeUp(), now=1e6).phase == "waiting"


def test_a_later_round_waits_for_who_is_away_and_then_goes_on():
    state = after(RULES, training(), Absent(1, for_good=False), Contributed(1, "x"), Contributed(0, "y"), Aggregated({}), Calibrated({}))
    assert (state.phase, state.due) == ("waiting", RETURN_S)
    assert after(RULES, state, Present(1)).chosen == (0, 1)
    assert after(RULES, state, TimeUp(), now=RETURN_S).chosen == (0,)


def test_who_said_goodbye_is_not_waited_for():
    rules = replace(RULES, min_devices=1)
    state = after(rules, training(rules), Contributed(0, "x"))
    assert state.phase == "aggregating"  # one device began the round alone
    rules = replace(RULES, min_devices=3)
    state = after(rules, training(rules, devices=3), Contributed(0, "x"), Contributed(1, "y"), Absent(2, for_good=True))
    assert state.phase == "aggregating"


def test_the_deadline_closes_a_round_with_a_quorum():
    state = after(RULES, training(), Contributed(0, "x"))
    assert after(RULES, state, TimeUp(), now=100.0).phase == "aggregating"


def test_the_deadline_without_a_quorum_is_extended_and_failures_are_forgiven():
    state = after(RULES, training(), CannotTrain(0, refused=False), CannotTrain(1, refused=True))
    following, notices = advance(RULES, state, TimeUp(), 100.0)
    assert notices == [Extended(1, 1, 0, 1)]
    assert (following.phase, following.due, following.owing) == ("training", 200.0, (0,))


def test_the_deadline_forgives_refused_ones_too_when_no_quorum_is_left_without_them():
    for gone in (Absent(0, for_good=True), CannotTrain(0, refused=True)):
        state = after(RULES, training(), CannotTrain(1, refused=True), gone)
        state = after(RULES, state, TimeUp(), now=100.0)
        assert 1 in state.owing
    rules = replace(RULES, quorum=1.0)
    state = after(rules, training(rules), Contributed(0, "x"), CannotTrain(1, refused=True), TimeUp(), now=100.0)
    assert state.owing == (1,)


@pytest.mark.parametrize("refused", [False, True])
def test_a_device_that_was_started_again_is_asked_again(refused):
    state = after(RULES, training(), CannotTrain(0, refused))
    assert state.owing == (1,)
    state = after(RULES, state, Absent(0, for_good=True), Restarted(0), Present(0))
    assert state.expected == (0, 1)
    assert after(RULES, state, Contributed(0, "x"), Contributed(1, "y")).phase == "aggregating"


def test_once_begun_a_quorum_is_enough_in_every_later_round():
    state = after(RULES, training(), Contributed(1, "x"), Absent(1, for_good=True), Contributed(0, "y"))
    for round in (2, 1):  # the next one, and the one after it
        state = after(RULES, state, Aggregated({}), Calibrated({}), now=5.0)
        if state.phase == "evaluating":
            state = after(RULES, state, Evaluated(), Prepared({}), now=5.0)
        assert (state.phase, state.round, state.chosen) == ("training", round, (0,))
        state = after(RULES, state, Contributed(0, "y"))


def test_others_are_chosen_when_those_chosen_cannot_make_a_quorum():
    rules = replace(RULES, sample=1)
    state = training(rules)
    assert len(state.chosen) == 1
    failed, other = state.chosen[0], 1 - state.chosen[0]
    following, notices = advance(rules, state, CannotTrain(failed, refused=False), 0.0)
    assert notices == [Joined((other,))]
    assert following.owing == (other,)


def test_others_are_chosen_at_the_deadline_when_those_chosen_are_silent():
    rules = replace(RULES, sample=1)
    state = training(rules)
    silent, other = state.chosen[0], 1 - state.chosen[0]
    state = after(rules, state, Absent(silent, for_good=False))
    assert state.chosen == (silent,)
    state = after(rules, state, TimeUp(), now=100.0)
    assert state.chosen == (0, 1)
    assert after(rules, state, Contributed(other, "x")).phase == "training"  # the silent one may still answer
    assert after(rules, state, Contributed(silent, "x"), TimeUp(), now=300.0).phase == "aggregating"


def test_a_restart_gives_the_round_its_whole_time_again():
    state = after(RULES, training(), Started(), now=77.0)
    assert state.due == 177.0
    assert set(state.devices.values()) == {"away"}


def test_the_state_survives_as_json():
    state = after(RULES, training(), Contributed(0, "x"), CannotTrain(1, refused=True))
    assert State.from_json(state.to_json()) == state


def run_through(rules, order, restarts):
    """Play a run in which all devices answer, in an order and with restarts as drawn; (final parts, number of rounds)."""
    state, step, now, begun = State(), 0, 0.0, 0

    def take(event):
        nonlocal state, step, begun
        state, notices = advance(rules, state, event, now)
        begun += sum(isinstance(notice, Begun) for notice in notices)
        step += 1
        if step in restarts:
            there = state.here
            state = State.from_json(state.to_json())
            state = after(rules, state, Started(), *(Present(number) for number in there))

    for number in range(3):
        take(Present(number))
    while state.phase != "finished":
        if (event := work(state)) is not None:
            take(event)
        else:
            take(update_of(state, order.choice(state.owing)))
    return state.parts, begun


@settings(max_examples=60, deadline=None)
@given(order=st.randoms(use_true_random=False), restarts=st.sets(st.integers(1, 40)), sample=st.sampled_from([None, 1, 2]))
def test_neither_order_nor_restarts_change_the_result(order, restarts, sample):
    rules = replace(RULES, sample=sample)
    parts, begun = run_through(rules, order, restarts)
    assert begun == sum(rules.rounds)
    assert parts == run_through(rules, order, set())[0]


EVENTS = st.one_of(
    st.builds(Present, st.integers(0, 3)),
    st.builds(Absent, st.integers(0, 3), st.booleans()),
    st.builds(Restarted, st.integers(0, 3)),
    st.builds(CannotTrain, st.integers(0, 3), st.booleans()),
    st.builds(lambda number: number, st.integers(0, 3)),  # an update of this device
    st.just(TimeUp()),
    st.just(Started()),
    st.just("work"),
)


@settings(max_examples=150, deadline=None)
@given(events=st.lists(EVENTS, max_size=80), quorum=st.sampled_from([0.1, 0.5, 1.0]), sample=st.sampled_from([None, 1, 2]))
def test_no_order_of_events_breaks_a_run(events, quorum, sample):
    rules = replace(RULES, quorum=quorum, sample=sample)
    state, now, counted = State(), 0.0, set()
    for event in events:
        now += 10
        event = update_of(state, event) if isinstance(event, int) else work(state) if event == "work" else event
        if event is None:
            continue
        before = state
        try:
            state, _ = advance(rules, before, event, now)
        except IllegalEvent:
            continue
        if isinstance(event, Contributed):
            assert event.contribution not in counted
            counted.add(event.contribution)
        check(before, state)
        assert State.from_json(state.to_json()) == state
    finish(rules, state, now)


def check(before, state):
    assert set(state.contributed) <= set(state.chosen)
    assert not set(state.contributed) & set(state.failed)
    assert (state.stage, state.round) >= (before.stage, before.round)
    if before.phase == "training" and state.phase != "training":
        assert state.phase == "aggregating"
        assert len(state.contributed) >= state.needed >= 1
    assert (state.due is not None) == (state.phase in ("waiting", "training"))


def finish(rules, state, now):
    """However it began: with all devices there and answering, every run ends."""
    for number in range(4):
        state = after(rules, state, Present(number), now=now)
    for _ in range(100):
        if state.phase == "finished":
            return
        now += 1000
        owing = [one for one in state.owing if state.devices.get(one) == "here"]
        event = work(state) or (update_of(state, owing[0]) if owing else TimeUp())
        state = after(rules, state, event, now=now)
    raise AssertionError(state)
