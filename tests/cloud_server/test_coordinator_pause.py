"""The course of a run as a pure function: an operator who pauses it."""

import pytest

from lwfed.cloud_server.coordinator import advance
from lwfed.cloud_server.events import (
    Aggregated,
    Calibrated,
    Contributed,
    Evaluated,
    IllegalEvent,
    Paused,
    Prepared,
    Present,
    Resumed,
    Started,
    TimeUp,
)
from lwfed.cloud_server.rounds import State

from .machine import RULES, after, training


def test_a_pause_lets_the_round_end_and_no_other_begin():
    state = after(RULES, training(), Paused(withdraw=False), Contributed(0, "x"), Contributed(1, "y"), Aggregated({}, 1.0), Calibrated({}))
    assert (state.phase, state.round, state.due, state.suspended) == ("waiting", 2, None, False)
    state = after(RULES, State.from_json(state.to_json()), Started(), Present(0), Present(1), Paused(withdraw=False))
    assert (state.phase, state.due) == ("waiting", None)
    with pytest.raises(IllegalEvent):
        advance(RULES, state, TimeUp(), 1e6)
    state = after(RULES, state, Resumed(), now=50.0)
    assert (state.phase, state.round, state.due) == ("training", 2, 150.0)


def test_a_pause_before_the_first_round_holds_it_back():
    state = after(RULES, State(), Paused(withdraw=False), Prepared({}), Evaluated(), Present(0), Present(1))
    assert state.phase == "waiting"
    assert after(RULES, state, Resumed()).phase == "training"


def test_a_round_that_is_withdrawn_goes_on_with_the_updates_that_it_had():
    state = after(RULES, training(), Contributed(0, "x"), Paused(withdraw=True), now=20.0)
    assert (state.phase, state.owing, state.suspended, state.due) == ("waiting", (), True, None)
    state = after(RULES, State.from_json(state.to_json()), Started(), Present(0), Present(1), now=1000.0)
    assert state.suspended
    state = after(RULES, state, Resumed(), now=5000.0)
    assert (state.phase, state.owing, state.contributed, state.due) == ("training", (1,), {0: "x"}, 5100.0)
    assert after(RULES, state, Contributed(1, "y"), now=5010.0).phase == "aggregating"


def test_a_withdrawal_may_follow_a_pause_and_a_second_resume_changes_nothing():
    state = after(RULES, training(), Paused(withdraw=False), Paused(withdraw=True))
    assert state.suspended
    state = after(RULES, state, Paused(withdraw=False), Resumed())
    assert (state.phase, state.paused) == ("training", False)
    assert after(RULES, state, Resumed(), now=70.0) == state


def test_a_run_that_is_over_is_not_paused():
    finished = State(phase="finished", stage=2, round=2)
    assert after(RULES, finished, Paused(withdraw=True)) == finished
