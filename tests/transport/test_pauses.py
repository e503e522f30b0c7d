"""How long a device waits between two connections."""

import time
from types import SimpleNamespace

import pytest

from lwfed.transport.mqtt import FIRST_DELAY_S, LONGEST_DELAY_S, STABLE_S, USEFUL, USEFUL_DELAY_S, _Pauses

JITTER = (0.75, 1.25)


def session(seconds=1.0, carried=0):
    return SimpleNamespace(up_since=time.monotonic() - seconds, carried=carried)


def delays(sessions):
    """Seconds after each; sessions as arguments of `session`, or None where it came to none."""
    pauses, found = _Pauses(), []
    for one in sessions:
        pauses.note(SimpleNamespace(up_since=None) if one is None else session(**one))
        found.append(pauses.following())
    return found, pauses


def within(seconds, doubled):
    expected = min(FIRST_DELAY_S * 2**doubled, LONGEST_DELAY_S)
    return JITTER[0] * expected <= seconds <= JITTER[1] * expected


@pytest.mark.parametrize("useless", [{}, {"carried": USEFUL - 1}])
def test_sessions_that_bring_nothing_double_the_pause(useless):
    found, pauses = delays([useless] * 9)
    assert all(within(seconds, doubled) for doubled, seconds in enumerate(found))
    assert pauses.short_sessions == 9


def test_one_that_lasted_starts_anew():
    found, _ = delays([{}, {}, {"seconds": STABLE_S}, {}])
    assert [within(*one) for one in zip(found, (0, 1, 0, 1), strict=True)] == [True] * 4


def test_a_link_that_carries_something_is_not_left_alone_for_long():
    found, _ = delays([{"carried": USEFUL}] * 9)
    assert within(found[0], 0)
    assert within(found[1], 1)
    assert all(JITTER[0] * USEFUL_DELAY_S <= seconds <= JITTER[1] * USEFUL_DELAY_S for seconds in found[2:])


def test_a_link_that_breaks_often_is_still_a_suspicion_of_two_agents_with_one_name():
    assert delays([{"carried": USEFUL}] * 3)[1].short_sessions == 3
    assert delays([{"seconds": STABLE_S}] * 3)[1].short_sessions == 0


def test_attempts_that_fail_double_the_pause():
    found, pauses = delays([None] * 4)
    assert all(within(seconds, doubled) for doubled, seconds in enumerate(found))
    assert pauses.short_sessions == 0
