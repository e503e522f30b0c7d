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
    Unfit,
    advance,
)
from lwfed.cloud_server.rounds import (
    MAX_ATTEMPTS,
    Aggregate,
    Begun,
    Calibrate,
    Collapsed,
    Evaluate,
    Export,
    Extended,
    IllegalEvent,
    Joined,
    Prepare,
    Reduced,
    Rules,
    Stalled,
    State,
    duty,
)

RULES = Rules(
    seed=0, stages=2, rounds=(2, 2), parts=(("stem", "layer.1", "adapter.1"), ("stem", "layer.1", "layer.2")), min_devices=2,
    sample=None, quorum=0.5, deadline_s=100.0, calibrate="round", evaluate=True, judge=True, patience=None,
    plateau_rounds=None, plateau_factor=0.5, on_collapse="warn",
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


def fingerprint(*things):
    ordered = [sorted(thing.items()) if isinstance(thing, dict) else thing for thing in things]
    return hashlib.sha256(repr(ordered).encode()).hexdigest()[:8]


def work(state, collapses=frozenset()):
    """The event with which a duty ends: a function of the duty and the model. (stage, attempt) of `collapses` collapse."""
    match duty(state):
        case Prepare(stage, attempt):
            return Prepared(
                {f"layer.{stage}": fingerprint("init", stage, attempt), f"adapter.{stage}": fingerprint("init", stage, attempt)}
            )
        case Evaluate(stage, baselines):
            return Evaluated(None if baselines else (stage, state.attempt) in collapses)
        case Aggregate(stage, contributions):
            merged = fingerprint(state.parts, contributions)
            return Aggregated({f"layer.{stage}": merged}, loss=int(merged, 16) / 2**32)
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
    state = after(rules, state, Aggregated({"stem": "b"}, 1.0))
    assert (state.phase, state.parts) == ("calibrating", {"stem": "b"})
    state = after(rules, state, Calibrated({"stem": "c"}))
    assert (state.phase, state.round, state.parts) == ("training", 2, {"stem": "c"})


def test_without_calibration_and_evaluation_their_phases_are_left_out():
    rules = replace(RULES, calibrate="never", evaluate=False, judge=False, rounds=(1,), stages=1)
    state = after(rules, training(rules), Contributed(0, "x"), Contributed(1, "y"), Aggregated({}, 1.0))
    assert state.phase == "finished"


def play(rules, losses=(), collapses=frozenset()):
    """A run of two devices that always answer: what happened, as (stage, attempt, round, phase) whenever one changes, and all notices.

    Rounds get the `losses` one after the other, and 0 afterwards.
    """
    state, places, said, losses = State(), [], [], iter(losses)
    for number in range(2):
        state = after(rules, state, Present(number))
    while True:
        places.append((state.stage, state.attempt, state.round, state.phase))
        if state.over:
            return places, said, state
        event = work(state, collapses) or update_of(state, state.owing[0])
        if isinstance(event, Aggregated):
            event = replace(event, loss=next(losses, 0.0))
        state, notices = advance(rules, state, event, 0.0)
        said += notices


def rounds_with(phase, places):
    return [round for stage, _, round, now in places if stage == 1 and now == phase]


@pytest.mark.parametrize(
    ("every", "rounds", "calibrated"),
    [("round", 3, [1, 2, 3]), ("stage", 3, [3]), ("never", 3, []), (1, 3, [1, 2, 3]), (2, 5, [2, 4]), (3, 3, [3]), (4, 3, [])],
)
def test_calibration_every_so_many_rounds(every, rounds, calibrated):
    rules = replace(RULES, calibrate=every, rounds=(rounds, 1))
    assert rounds_with("calibrating", play(rules)[0]) == calibrated


def test_every_attempt_is_calibrated_in_the_same_rounds():
    rules = replace(RULES, calibrate=2, rounds=(3, 1), on_collapse="repeat")
    assert rounds_with("calibrating", play(rules, collapses={(1, 1)})[0]) == [2, 5]


def test_a_stage_ends_when_its_loss_no_longer_falls():
    rules = replace(RULES, rounds=(9, 9), patience=2, calibrate="stage")
    places, said, state = play(rules, [5.0, 4.0, 4.5, 3.0, 3.0, 3.1, *(9.0 - number for number in range(9))])
    assert max(rounds_with("training", places)) == 6
    assert rounds_with("calibrating", places) == [6]
    assert (state.phase, state.stage, state.round) == ("finished", 2, 9)  # whose loss fell in every round
    assert [notice for notice in said if isinstance(notice, Stalled)] == [Stalled(1, 6)]


def test_the_rate_is_reduced_from_the_round_after_a_plateau_on_and_whole_again_in_the_next_stage():
    rules = replace(RULES, rounds=(7, 2), plateau_rounds=2)
    state, scales, losses = State(), {}, iter([5.0, 5.0, 6.0, 5.5, 5.0, 4.0, 4.5])
    for number in range(2):
        state = after(rules, state, Present(number))
    said = []
    while not state.over:
        scales.setdefault((state.stage, state.round), set()).add(rules.lr_scale(state))  # in every phase of the round the same
        event = work(state) or update_of(state, state.owing[0])
        state, notices = advance(rules, state, replace(event, loss=next(losses, 1.0)) if isinstance(event, Aggregated) else event, 0.0)
        state = State.from_json(state.to_json())
        said += [notice for notice in notices if isinstance(notice, Reduced)]
    first = [scales[1, round] for round in range(1, 8)]
    assert first == [{1.0}, {1.0}, {1.0}, {0.5}, {0.5}, {0.25}, {0.25}]
    assert (scales[2, 1], scales[2, 2]) == ({1.0}, {1.0})
    assert said == [Reduced(1, 3, 0.5), Reduced(1, 5, 0.25)]


def test_without_a_schedule_by_plateaus_the_rate_is_whole():
    state = State(losses=dict.fromkeys(range(1, 9), 1.0), round=9)
    assert RULES.lr_scale(state) == 1.0
    assert replace(RULES, plateau_rounds=1).lr_scale(state) == 0.5**7


def test_a_collapse_is_reported_and_built_upon_by_default():
    _, said, state = play(RULES, collapses={(1, 1)})
    assert (state.phase, state.stage) == ("finished", 2)
    assert [notice for notice in said if isinstance(notice, Collapsed)] == [Collapsed(1, 1, "warn")]


def test_a_stage_that_collapsed_begins_anew_where_it_began_and_goes_on_counting_rounds():
    rules = replace(RULES, on_collapse="repeat", rounds=(2, 3))
    places, said, state = play(rules, collapses={(2, 1), (2, 2)})
    assert state.phase == "finished"
    assert [place[:3] for place in places if place[3] == "aggregating"] == [
        (1, 1, 1), (1, 1, 2), *((2, attempt, round) for attempt in (1, 2, 3) for round in range(3 * attempt - 2, 3 * attempt + 1)),
    ]  # fmt: skip
    assert [notice for notice in said if isinstance(notice, Collapsed)] == [Collapsed(2, 1, "repeat"), Collapsed(2, 2, "repeat")]
    assert rules.last_round(2, 7) == 9


def test_a_repeated_stage_gets_back_the_model_that_it_found():
    rules = replace(RULES, on_collapse="repeat")
    state = State(phase="evaluating", stage=2, round=2, trained=True, parts={"stem": "b", "layer.1": "calibrated", "layer.2": "bad"},
                  start={"stem": "b", "layer.1": "a"}, losses={1: 1.0, 2: 2.0})  # fmt: skip
    again = after(rules, state, Evaluated(True))
    assert (again.phase, again.attempt, again.round, again.parts, again.losses) == ("preparing", 2, 3, state.start, {})
    assert duty(again) == Prepare(2, 2)
    assert after(rules, again, Prepared({"layer.2": "new"})).parts == {"stem": "b", "layer.1": "a", "layer.2": "new"}


@pytest.mark.parametrize(("reaction", "attempts"), [("stop", 1), ("repeat", MAX_ATTEMPTS)])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_collapse_that_stays_stops_the_run(reaction, attempts, stage):
    rules = replace(RULES, on_collapse=reaction)
    _, said, state = play(rules, collapses={(stage, attempt) for attempt in range(1, 9)})
    assert (state.phase, state.stage, state.attempt, state.sound_stage) == ("stopped", stage, attempts, stage - 1)
    assert said[-1] == Collapsed(stage, attempts, "stop")
    assert duty(state) == Export()
    assert after(rules, state, Present(2), Absent(0, for_good=False), Started()).phase == "stopped"


def test_what_cannot_be_judged_is_no_collapse():
    state = State(phase="evaluating", stage=1, round=2, trained=True)
    assert after(replace(RULES, on_collapse="stop"), state, Evaluated(None)).phase == "preparing"


def test_random_weights_are_not_judged():
    state = after(replace(RULES, on_collapse="stop"), State(), Prepared({"stem": "s"}), Evaluated(True))
    assert state.phase == "waiting"


def test_parts_that_the_next_stage_does_not_have_leave_the_model():
    _, _, state = play(RULES)
    assert "adapter.1" not in state.parts
    for evaluate in (False, True):
        rules = replace(RULES, evaluate=evaluate, judge=evaluate, rounds=(1, 1), calibrate="never")
        state = after(rules, training(rules), Contributed(0, "x"), Contributed(1, "y"), Aggregated({"layer.1": "l", "adapter.1": "a"}, 1.0))
        if evaluate:
            assert "adapter.1" in state.parts
            state = after(rules, state, Evaluated())
        assert state.parts == state.start == {"stem": "s1", "layer.1": "l"}


@pytest.mark.parametrize(
    "event", [Prepared({}), Evaluated(), Aggregated({}, 1.0), Calibrated({}), Contributed(7, "x"), CannotTrain(7, True), Unfit(7, "no")]
)
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
    state = after(
        RULES, training(), Absent(1, for_good=False), Contributed(1, "x"), Contributed(0, "y"), Aggregated({}, 1.0), Calibrated({})
    )
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
        state = after(RULES, state, Aggregated({}, 1.0), Calibrated({}), now=5.0)
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
COLLAPSES = st.frozensets(st.tuples(st.integers(1, 2), st.integers(1, MAX_ATTEMPTS)))


@settings(max_examples=100, deadline=None)
@given(order=st.randoms(use_true_random=False), restarts=st.sets(st.integers(1, 60)), rules=RULES_DRAWN, collapses=COLLAPSES)
def test_neither_order_nor_restarts_change_the_result(order, restarts, rules, collapses):
    result, begun = run_through(rules, order, restarts, collapses)
    assert result == run_through(rules, order, set(), collapses)[0]
    if rules.patience is None and (not rules.judge or rules.on_collapse == "warn"):
        assert begun == sum(rules.rounds)


def test_an_unfit_device_counts_no_longer():
    rules = replace(RULES, quorum=1.0, min_devices=3)
    state = after(rules, training(rules, devices=3), Unfit(0, "no images"))
    assert (state.chosen, state.needed, state.devices[0]) == ((1, 2), 2, "gone")
    assert after(rules, state, Contributed(1, "x"), Contributed(2, "y")).phase == "aggregating"
    assert after(rules, training(rules, devices=3), Contributed(1, "x"), Contributed(2, "y"), Unfit(0, "no images")).phase == "aggregating"
    alone = after(RULES, training(), Unfit(0, "no images"), Unfit(1, "no images"))
    assert (alone.phase, alone.needed, alone.stuck) == ("training", 1, True)


def test_another_device_trains_in_the_place_of_an_unfit_one_which_stays_so_until_it_begins_anew():
    rules = replace(RULES, sample=2, min_devices=4)
    before = training(rules, devices=4)
    assert len(before.chosen) == 2
    state, notices = advance(rules, before, Unfit(before.chosen[0], "no memory"), 0.0)
    (joined,) = notices
    assert set(state.chosen) == {before.chosen[1], *joined.participants}
    assert state.needed == before.needed
    assert State.from_json(state.to_json()).unfit == {before.chosen[0]: "no memory"}
    assert after(rules, state, Restarted(before.chosen[0])).unfit == {}


EVENTS = st.one_of(
    st.builds(Present, st.integers(0, 3)),
    st.builds(Absent, st.integers(0, 3), st.booleans()),
    st.builds(Restarted, st.integers(0, 3)),
    st.builds(CannotTrain, st.integers(0, 3), st.booleans()),
    st.builds(Unfit, st.integers(0, 3), st.just("no images")),
    st.builds(lambda number: number, st.integers(0, 3)),  # an update of this device
    st.just(TimeUp()),
    st.just(Started()),
    st.just("work"),
)


@settings(max_examples=200, deadline=None)
@given(events=st.lists(EVENTS, max_size=120), quorum=st.sampled_from([0.1, 0.5, 1.0]), rules=RULES_DRAWN, collapses=COLLAPSES)
def test_no_order_of_events_breaks_a_run(events, quorum, rules, collapses):
    rules = replace(rules, quorum=quorum)
    state, now, counted = State(), 0.0, set()
    for event in events:
        now += 10
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
    if before.phase == "training" and state.phase != "training":
        assert state.phase == "aggregating"
        assert len(state.contributed) >= state.needed >= 1
    assert (state.due is not None) == (state.phase in ("waiting", "training"))


def finish(rules, state, now, collapses):
    """However it began: with all devices there and answering, every run ends."""
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
