"""The course of a run as a pure function: devices that come, go, answer late or never."""

import json
from dataclasses import replace

import pytest

from lwfed.cloud_server.coordinator import RETURN_S, advance
from lwfed.cloud_server.deadlines import LEAST_DEADLINE_S, own_deadline
from lwfed.cloud_server.events import (
    Absent,
    Aggregated,
    Calibrated,
    CannotTrain,
    Contributed,
    Evaluated,
    IllegalEvent,
    Prepared,
    Present,
    RanShort,
    Reconnected,
    Refused,
    Restarted,
    Started,
    TimeUp,
    Unfit,
)
from lwfed.cloud_server.notices import Closed, Extended, Joined, Overdue
from lwfed.cloud_server.rounds import State

from .machine import RULES, after, training


def test_a_second_update_of_a_device_is_illegal():
    state = after(RULES, training(), Contributed(0, "x"))
    with pytest.raises(IllegalEvent):
        advance(RULES, state, Contributed(0, "other"), 0.0)


def test_who_falls_silent_after_the_wait_for_others_is_not_waited_for():
    rules = replace(RULES, min_devices=3)
    state = after(rules, State(), Prepared({}), Evaluated(), Present(0), Present(1), Absent(1, for_good=False))
    state = after(rules, state, TimeUp(), now=RETURN_S)
    state = after(rules, state, Present(2), Absent(2, for_good=False), Present(3), Present(1), now=RETURN_S + 1)
    assert (state.phase, state.chosen) == ("training", (0, 1, 3))


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


def test_whose_connection_to_us_broke_must_be_seen_anew():
    """A broker that died with us may have taken along that a device went."""
    state = after(RULES, training(devices=3), Absent(2, for_good=True), Reconnected())
    assert state.devices == {0: "away", 1: "away", 2: "gone"}
    assert state.expected == (0, 1)
    answered = after(RULES, state, Present(0), Contributed(0, "x"), TimeUp(), Aggregated({}, 1.0), Calibrated({}), now=1000.0)
    assert after(RULES, answered, TimeUp(), now=1000.0 + RETURN_S).chosen == (0,)


def test_whoever_does_not_answer_until_the_deadline_is_no_hope_for_a_quorum():
    """It may have gone without a word."""
    rules = replace(RULES, sample=2, quorum=1.0)
    state = training(rules, devices=3)
    answers, silent = state.chosen
    overdue = after(rules, state, Contributed(answers, "x"), TimeUp(), now=rules.deadline_s)
    (other,) = {0, 1, 2} - {answers, silent}
    assert overdue.owing == tuple(sorted((silent, other)))
    assert after(rules, overdue, Contributed(other, "y"), TimeUp(), now=2 * rules.deadline_s).phase == "aggregating"


def test_who_is_away_at_the_deadline_is_no_part_of_the_quorum_where_enough_are_left():
    rules = replace(RULES, quorum=1.0)
    three = replace(training(rules, devices=3), chosen=(0, 1, 2), needed=3)
    answered = after(rules, three, Absent(0, for_good=False), Contributed(1, "x"), Contributed(2, "y"))
    assert answered.phase == "training", "it may return"
    assert after(rules, answered, TimeUp(), now=rules.deadline_s).phase == "aggregating"
    two = after(rules, training(rules), Absent(0, for_good=False), Contributed(1, "x"), TimeUp(), now=rules.deadline_s)
    assert (two.phase, two.needed) == ("training", 2), "no round would begin with one"


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
    state = after(RULES, training(), CannotTrain(0, attempt=1), Refused(1))
    following, notices = advance(RULES, state, TimeUp(), 100.0)
    assert notices == [Extended(1, 1, 0, 1)]
    assert (following.phase, following.due, following.owing) == ("training", 200.0, (0,))


def test_the_deadline_forgives_refused_ones_too_when_no_quorum_is_left_without_them():
    for gone in (Absent(0, for_good=True), Refused(0)):
        state = after(RULES, training(), Refused(1), gone)
        state = after(RULES, state, TimeUp(), now=100.0)
        assert 1 in state.owing
    rules = replace(RULES, quorum=1.0)
    state = after(rules, training(rules), Contributed(0, "x"), Refused(1), TimeUp(), now=100.0)
    assert state.owing == (1,)


@pytest.mark.parametrize("event", [CannotTrain(0, attempt=1), Refused(0)])
def test_a_device_that_was_started_again_is_asked_again(event):
    state = after(RULES, training(), event)
    assert state.owing == (1,)
    state = after(RULES, state, Absent(0, for_good=True), Restarted(0), Present(0))
    assert state.expected == (0, 1)
    assert after(RULES, state, Contributed(0, "x"), Contributed(1, "y")).phase == "aggregating"


def test_a_device_that_ran_short_of_memory_is_expected_once_more_in_each_round():
    state = after(RULES, training(), RanShort(0, attempt=1), now=7.0)
    assert state.expected == (0, 1)
    assert (state.asked, state.retried) == ({0: 7.0, 1: 0.0}, (0,))
    assert State.from_json(state.to_json()) == state
    for gone in (after(RULES, state, RanShort(0, attempt=2)), after(RULES, state, Absent(0, for_good=True))):
        assert gone.expected == (1,)
    failed = after(RULES, state, RanShort(0, attempt=2))
    assert failed.failed == {0: "failed"}
    assert after(RULES, failed, Restarted(0), RanShort(0, attempt=3)).expected == (0, 1), "begun anew it may have more"
    done = after(RULES, state, Contributed(0, "x"), Contributed(1, "y"), Aggregated({}, 1.0), Calibrated({}))
    assert (done.round, done.retried) == (2, ())
    assert after(RULES, done, RanShort(1, attempt=1)).expected == (0, 1)


def test_who_is_not_waited_for_cannot_run_short():
    state = after(RULES, training(), Contributed(0, "x"))
    with pytest.raises(IllegalEvent):
        advance(RULES, state, RanShort(0, attempt=1), 0.0)


def failure(kind, participant, attempt):
    return Unfit(participant, "no images", attempt) if kind is Unfit else kind(participant, attempt)


@pytest.mark.parametrize("kind", [CannotTrain, RanShort, Unfit])
def test_an_attempt_that_failed_is_counted_once_in_a_round_though_its_device_begins_anew(kind):
    failed = after(RULES, training(), failure(kind, 0, attempt=2))
    anew = after(RULES, failed, Restarted(0), Present(0))
    anew = after(RULES, anew, TimeUp(), now=100.0) if kind is Unfit else anew  # the deadline, at which it is chosen again
    assert 0 in anew.owing
    for attempt in (1, 2):
        with pytest.raises(IllegalEvent):
            advance(RULES, anew, failure(kind, 0, attempt), 0.0)
    assert after(RULES, anew, RanShort(0, attempt=3)).expected == (0, 1), "it still has its second try"
    done = after(RULES, anew, Contributed(0, "x"), Contributed(1, "y"), Aggregated({}, 1.0), Calibrated({}))
    assert after(RULES, done, failure(kind, 0, attempt=1)).attempts == {0: 1}, "in another round it counts from 1"


def test_whom_a_server_that_counted_no_attempts_asked_once_more_is_asked_no_third_time():
    stored = {**json.loads(training().to_json()), "retried": [0]}
    del stored["attempts"]
    state = State.from_json(json.dumps(stored))
    assert state.knows_failure(0, attempt=1)
    assert after(RULES, state, RanShort(0, attempt=2)).failed == {0: "failed"}


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
    following, notices = advance(rules, state, CannotTrain(failed, attempt=1), 0.0)
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


def test_an_unfit_device_counts_no_longer():
    rules = replace(RULES, quorum=1.0, min_devices=3)
    state = after(rules, training(rules, devices=3), Unfit(0, "no images", attempt=1))
    assert (state.chosen, state.needed, state.devices[0]) == ((1, 2), 2, "gone")
    assert after(rules, state, Contributed(1, "x"), Contributed(2, "y")).phase == "aggregating"
    state = after(rules, training(rules, devices=3), Contributed(1, "x"), Contributed(2, "y"), Unfit(0, "no images", attempt=1))
    assert state.phase == "aggregating"
    alone = after(RULES, training(), Unfit(0, "no images", attempt=1), Unfit(1, "no images", attempt=1))
    assert (alone.phase, alone.needed, alone.stuck) == ("training", 1, True)


def test_another_device_trains_in_the_place_of_an_unfit_one_which_stays_so_until_it_begins_anew():
    rules = replace(RULES, sample=2, min_devices=4)
    before = training(rules, devices=4)
    assert len(before.chosen) == 2
    state, notices = advance(rules, before, Unfit(before.chosen[0], "no memory", attempt=1), 0.0)
    (joined,) = notices
    assert set(state.chosen) == {before.chosen[1], *joined.participants}
    assert state.needed == before.needed
    assert State.from_json(state.to_json()).unfit == {before.chosen[0]: "no memory"}
    assert after(rules, state, Restarted(before.chosen[0])).unfit == {}


SLOW = replace(RULES, straggler_factor=4.0, deadline_s=3600.0, min_devices=3, rounds=(9, 9), calibrate="never", evaluate=False, judge=False)


def second_round(rules, *seconds):
    """The second round at 10000 s, after a first one in which devices 0, 1, ... took so many seconds."""
    state = training(rules, devices=len(seconds))
    for participant, taken in sorted(enumerate(seconds), key=lambda one: one[1]):
        state = after(rules, state, Contributed(participant, "x"), now=taken)
    return after(rules, state, Aggregated({}, 1.0), now=10_000.0)


def test_before_anything_is_measured_the_deadline_of_the_round_alone_counts():
    state = training(SLOW, devices=3)
    assert [own_deadline(SLOW, state, one) for one in range(3)] == [3600.0] * 3
    assert state.due == 3600.0


def test_a_device_has_a_multiple_of_what_it_last_took():
    state = second_round(SLOW, 1.0, 100.0, 2000.0)
    assert state.pace == {0: 1.0, 1: 100.0, 2: 2000.0}
    own = [own_deadline(SLOW, state, one) - 10_000 for one in range(3)]
    assert own == [LEAST_DEADLINE_S, 400.0, 3600.0]
    assert state.due == 10_000 + LEAST_DEADLINE_S
    state = after(SLOW, state, Contributed(0, "x"), now=10_050.0)
    assert (state.due, state.pace[0]) == (10_400.0, 50.0)
    assert own_deadline(replace(SLOW, straggler_factor=None), state, 1) == 13_600.0


def test_a_round_with_a_quorum_goes_on_without_its_stragglers():
    state = second_round(SLOW, 50.0, 50.0, 50.0)
    state = after(SLOW, state, Contributed(0, "x"), Contributed(1, "y"), now=10_050.0)
    following, notices = advance(SLOW, state, TimeUp(), 10_200.0)
    assert (following.phase, following.contributed) == ("aggregating", {0: "x", 1: "y"})
    assert notices == [Overdue(2, 50.0), Closed(1, 2, 2)]


def test_without_a_quorum_a_straggler_is_replaced_or_waited_for_and_its_late_update_counts():
    rules = replace(SLOW, quorum=1.0)
    state = after(rules, second_round(rules, 50.0, 50.0, 50.0), Contributed(0, "x"), Contributed(1, "y"), now=10_050.0)
    late = after(rules, state, TimeUp(), now=10_200.0)
    assert (late.phase, late.stragglers, late.due, late.stuck) == ("training", (2,), 13_600.0, False)
    assert after(rules, late, Contributed(2, "z"), now=10_300.0).contributed == {0: "x", 1: "y", 2: "z"}
    newcomer = after(rules, late, Present(3), now=10_250.0)
    assert newcomer.owing == (2, 3)
    both = [after(rules, newcomer, Contributed(one, "z"), now=10_300.0) for one in (2, 3)]
    assert [one.phase for one in both] == ["training", "aggregating"]  # nobody waits for 2, and 3 is at work
    assert [one.contributed for one in both] == [{0: "x", 1: "y", 2: "z"}, {0: "x", 1: "y", 3: "z"}]


def test_who_has_become_slower_gets_more_time_instead_of_missing_every_deadline():
    state = second_round(SLOW, 50.0, 50.0, 50.0)
    rounds = 0
    while 2 not in state.contributed:
        begun = state.asked[2]
        state = after(SLOW, state, Contributed(0, "x"), Contributed(1, "y"), now=begun + 50)
        slow = begun + 3000 < own_deadline(SLOW, state, 2)
        state = after(SLOW, state, Contributed(2, "z"), now=begun + 3000) if slow else after(SLOW, state, TimeUp(), now=state.due)
        if not slow:
            state = after(SLOW, state, Aggregated({}, 1.0), now=begun + 3600)
            rounds += 1
    assert rounds == 2
    away = after(SLOW, second_round(SLOW, 50.0, 50.0, 50.0), Absent(2, for_good=False), Contributed(0, "x"), Contributed(1, "y"))
    assert after(SLOW, away, TimeUp(), now=10_200.0).pace[2] == 50.0  # of who was not there nothing was measured


def test_a_restart_of_the_server_measures_nothing_and_makes_nobody_a_straggler():
    state = after(SLOW, second_round(SLOW, 50.0, 50.0, 50.0), Started(), now=7.0)
    assert (state.due, state.stragglers) == (3607.0, ())
    assert after(SLOW, state, Contributed(0, "x"), now=9.0).pace[0] == 50.0


def test_what_an_older_server_stored_is_read():
    state = second_round(SLOW, 50.0, 60.0, 70.0)
    stored = json.loads(state.to_json())
    for key in ("pace", "asked", "stragglers", "deadline", "paused"):
        del stored[key]
    older = after(SLOW, State.from_json(json.dumps(stored)), Started(), now=5.0)
    assert older == replace(after(SLOW, state, Started(), now=5.0), pace={})


OVER = replace(RULES, sample=2, oversample=1.5, min_devices=4, quorum=1.0)


def test_of_more_chosen_devices_the_first_sample_make_the_round():
    state = training(OVER, devices=4)
    assert (len(state.chosen), state.needed) == (3, 2)
    first, second, third = state.chosen
    state = after(OVER, state, Contributed(third, "x"))
    assert state.phase == "training"
    state = after(OVER, state, Contributed(first, "y"))
    assert (state.phase, state.contributed) == ("aggregating", {first: "y", third: "x"})
    assert second not in state.owing


def test_over_selection_makes_up_for_who_fails():
    state = training(OVER, devices=4)
    first, second, third = state.chosen
    state = after(OVER, state, CannotTrain(first, attempt=1))
    assert state.chosen == (first, second, third)  # nobody else has to be asked
    assert after(OVER, state, Contributed(second, "x"), Contributed(third, "y")).phase == "aggregating"


@pytest.mark.parametrize(
    ("sample", "oversample", "selected"), [(None, 1.0, None), (10, 1.0, 10), (10, 1.3, 13), (10, 1.25, 13), (3, 1.1, 4)]
)
def test_how_many_are_chosen(sample, oversample, selected):
    assert replace(RULES, sample=sample, oversample=oversample).selected == selected


def test_a_device_that_comes_back_owes_what_it_owed():
    state = after(RULES, training(), Absent(0, for_good=True))
    assert state.expected == (1,)
    assert after(RULES, state, Present(0)).expected == (0, 1)
