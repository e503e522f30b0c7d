"""How long a round waits for each of its devices: by the device's own pace, and by `rounds.deadline_s` at most.

A pace is measured by the server's clock from task to update, so that it has in it what a device may need time for:
the download, the training, the queue for a slot, the upload.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lwfed.cloud_server.rounds import Rules, State

LEAST_DEADLINE_S = 120.0  # of a device, however fast it was: a reboot, torch's imports or a busy minute make no straggler


def own_deadline(rules: Rules, state: State, participant: int) -> float:
    """Until when the round waits for this device: a multiple of what it last took, if that is known."""
    asked, pace = state.asked.get(participant), state.pace.get(participant)
    if rules.straggler_factor is None or asked is None or pace is None:
        return state.deadline
    return min(state.deadline, asked + max(LEAST_DEADLINE_S, rules.straggler_factor * pace))


def opened(rules: Rules, state: State, now: float) -> State:
    """The round with its whole time before it; when those who owe an update were asked is not known any more."""
    return replace(state, phase="training", deadline=now + rules.deadline_s, stragglers=(), asked={})


def scheduled(rules: Rules, state: State) -> State:
    """With the time at which the next device, or the round, is over its deadline."""
    due = min((own_deadline(rules, state, one) for one in state.expected), default=state.deadline)
    return state if due == state.due else replace(state, due=due)


def elapsed(state: State, participants: Iterable[int], now: float) -> dict[int, float]:
    """Seconds since these were asked, where that is known."""
    return {one: round(now - state.asked[one], 3) for one in participants if one in state.asked}


def slowed(state: State, now: float) -> dict[int, float]:
    """The pace of those that are there and have not answered, where they take longer than they last did.

    Without it a device that has become slower would miss every deadline from then on.
    """
    known = [one for one in state.owing if one in state.pace and state.devices.get(one) == "here"]
    return {one: max(state.pace[one], seconds) for one, seconds in elapsed(state, known, now).items()}
