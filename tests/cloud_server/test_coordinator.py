"""The course of a run as a pure function: invariants under any order of events."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.cloud_server.coordinator import advance
from lwfed.cloud_server.events import (
    Absent,
    Aggregated,
    Calibrated,
    CannotTrain,
    Contributed,
    Evaluated,
    IllegalEvent,
    Paused,
    Prepared,
    Present,
    RanShort,
    Refused,
    Restarted,
    Resumed,
    Started,
    TimeUp,
    Unfit,
)
from lwfed.cloud_server.notices import Begun
from lwfed.cloud_server.rounds import MAX_ATTEMPTS, State

from .machine import RULES, after, training, update_of, work


@pytest.mark.parametrize(
    "event",
    [Prepared({}), Evaluated(), Aggregated({}, 1.0), Calibrated({}), Contributed(7, "x"), Refused(7), CannotTrain(7, 1), Unfit(7, "no", 1)],
)
def test_an_illegal_event_names_event_and_place(event):
    with pytest.raises(IllegalEvent, match=rf"{type(event).__name__}.* in phase training of stage 1, round 1"):
        advance(RULES, training(), event, 0.0)


def test_the_state_survives_as_json():
    state = after(RULES, training(), Contributed(0, "x"), Refused(1))
    assert State.from_json(state.to_json()) == state


def run_through(rules, order, restarts, collapses):
    """Play a run in which all devices answer, in an order and with restarts as drawn; (how it ended, number of rounds)."""
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
    while not state.over:
        if (event := work(state, collapses)) is not None:
            take(event)
        else:
            take(update_of(state, order.choice(state.owing)))
    return (state.phase, state.stage, state.attempt, state.round, state.parts), begun


RULES_DRAWN = st.builds(
    lambda **fields: replace(RULES, **fields),
    rounds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sample=st.sampled_from([None, 1, 2]),
    calibrate=st.sampled_from(["round", "stage", "never", 2]),
    evaluate=st.booleans(),
    judge=st.booleans(),
    patience=st.sampled_from([None, 1, 2]),
    plateau_rounds=st.sampled_from([None, 1]),
    on_collapse=st.sampled_from(["warn", "repeat", "stop"]),
)


REAL_WORLD = st.fixed_dictionaries(
    {
        "quorum": st.sampled_from([0.1, 0.5, 1.0]),
        "oversample": st.sampled_from([1.0, 1.5]),
        "straggler_factor": st.sampled_from([None, 2.0]),
        "deadline_s": st.sampled_from([100.0, 1000.0]),
    }
)
COLLAPSES = st.frozensets(st.tuples(st.integers(1, 2), st.integers(1, MAX_ATTEMPTS)))


@settings(max_examples=100, deadline=None)
@given(order=st.randoms(use_true_random=False), restarts=st.sets(st.integers(1, 60)), rules=RULES_DRAWN, collapses=COLLAPSES)
def test_neither_order_nor_restarts_change_the_result(order, restarts, rules, collapses):
    result, begun = run_through(rules, order, restarts, collapses)
    assert result == run_through(rules, order, set(), collapses)[0]
    if rules.patience is None and (not rules.judge or rules.on_collapse == "warn"):
        assert begun == sum(rules.rounds)


EVENTS = st.one_of(
    st.builds(Present, st.integers(0, 3)),
    st.builds(Absent, st.integers(0, 3), st.booleans()),
    st.builds(Restarted, st.integers(0, 3)),
    st.builds(Refused, st.integers(0, 3)),
    st.builds(CannotTrain, st.integers(0, 3), st.integers(1, 3)),
    st.builds(RanShort, st.integers(0, 3), st.integers(1, 3)),
    st.builds(Unfit, st.integers(0, 3), st.just("no images"), st.integers(1, 3)),
    st.builds(lambda number: number, st.integers(0, 3)),  # an update of this device
    st.just(TimeUp()),
    st.just(Started()),
    st.builds(Paused, st.booleans()),
    st.just(Resumed()),
    st.just("work"),
)


@settings(max_examples=200, deadline=None)
@given(events=st.lists(EVENTS, max_size=120), rules=RULES_DRAWN, more=REAL_WORLD, collapses=COLLAPSES)
def test_no_order_of_events_breaks_a_run(events, rules, more, collapses):
    rules = replace(rules, **more)
    state, now, counted = State(), 0.0, set()
    for event in events:
        now = state.due if isinstance(event, TimeUp) and state.due is not None else now + 10
        event = update_of(state, event) if isinstance(event, int) else work(state, collapses) if event == "work" else event
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
        check(rules, before, state, isinstance(event, Evaluated) and event.collapsed)
        assert State.from_json(state.to_json()) == state
    finish(rules, state, now, collapses)


def check(rules, before, state, collapsed):
    assert set(state.parts) <= {*rules.parts[state.stage - 1], f"adapter.{state.stage}"}
    assert set(state.start) <= set(rules.parts[state.stage - 1])
    assert rules.last_round(state.stage, state.round) == state.attempt * rules.rounds[state.stage - 1]
    assert set(state.losses) <= {round for round in range(1, state.round + 1) if rules.last_round(state.stage, round) >= state.round}
    if collapsed and rules.on_collapse != "warn":
        assert state.stage == before.stage, "nothing is built upon what collapsed"
        assert state.phase == "stopped" or state.parts == before.start
    assert before.over <= (state.phase == before.phase)
    assert set(state.contributed) <= set(state.chosen)
    assert not set(state.contributed) & set(state.failed)
    assert (state.stage, state.round) >= (before.stage, before.round)
    if before.phase == "training" and state.phase != "training" and not state.suspended:
        assert state.phase == "aggregating"
        assert len(state.contributed) >= state.needed >= 1
    assert (state.due is not None) == (state.phase == "training" or (state.phase == "waiting" and not state.paused))
    assert set(state.stragglers) <= set(state.chosen)
    assert not (state.retried or state.attempts) or state.chosen
    if state.paused:
        assert state.phase != "training" or before.phase == "training", "no round begins"
    if before.suspended and state.suspended:
        assert (state.contributed, state.chosen) == (before.contributed, before.chosen)


def finish(rules, state, now, collapses):
    """However it began: with all devices there and answering and nobody pausing it, every run ends."""
    state = after(rules, state, Resumed(), now=now)
    for number in range(4):
        state = after(rules, state, Present(number), now=now)
    for _ in range(400):
        if state.over:
            return
        now += 1000
        owing = [one for one in state.owing if state.devices.get(one) == "here"]
        event = work(state, collapses) or (update_of(state, owing[0]) if owing else TimeUp())
        state = after(rules, state, event, now=now)
    raise AssertionError(state)
