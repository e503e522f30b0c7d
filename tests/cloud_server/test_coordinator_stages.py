"""The course of a run as a pure function: phases, rounds and stages."""

from dataclasses import replace

import pytest

from lwfed.cloud_server.coordinator import advance
from lwfed.cloud_server.duty import Aggregate, Export, Prepare, duty
from lwfed.cloud_server.events import Absent, Aggregated, Calibrated, Contributed, Evaluated, Prepared, Present, Started
from lwfed.cloud_server.notices import Collapsed, Reduced, Stalled
from lwfed.cloud_server.rounds import MAX_ATTEMPTS, State

from .machine import RULES, after, training, update_of, work


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
