"""Stages and rounds of a run as one pure function: (rules, state, event, now) -> (state, notices).

    preparing --Prepared--> [evaluating: base lines, stage 1] --Evaluated--> waiting
    waiting --enough devices--> training --all answered, or time is up with a quorum--> aggregating
    aggregating --Aggregated--> [calibrating --Calibrated-->] a checkpoint: next round (waiting), or the stage ends:
    [evaluating --Evaluated-->] preparing of the next stage, or finished; where it collapsed perhaps preparing of the same
    stage once more, or stopped

`lwfed.cloud_server.duty` says what the phase wants done. The shell stores each state together with what caused it; after a crash it
loads the last one, hands over `Started` and does that duty again: every duty is a function of what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lwfed.cloud_server.deadlines import elapsed, opened, own_deadline, scheduled, slowed
from lwfed.cloud_server.events import (
    Absent,
    Aggregated,
    Calibrated,
    CannotTrain,
    Contributed,
    Evaluated,
    Event,
    IllegalEvent,
    Paused,
    Prepared,
    Present,
    RanShort,
    Reconnected,
    Refused,
    Restarted,
    Resumed,
    Started,
    TimeUp,
    Unfit,
)
from lwfed.cloud_server.notices import Begun, Closed, Collapsed, Extended, GivenUp, Joined, Notice, Overdue, Reduced, Stalled
from lwfed.cloud_server.rounds import MAX_ATTEMPTS, Reaction, Rules, State, unseen, with_presence
from lwfed.cloud_server.sampling import assign_more, free, sample

KEPT_PATCHES = 3  # of a part: who has been away for longer is better served with the whole part
RETURN_S = 60.0  # a round waits so long for devices that are merely away, so that a restart loses nobody

Result = tuple[State, list[Notice]]
Transition = Callable[[Rules, State, Any, float], Result]


def advance(rules: Rules, state: State, event: Event, now: float) -> Result:
    """Apply `event`; raises IllegalEvent, and then nothing has changed."""
    transition = TRANSITIONS.get((state.phase, type(event))) or ALWAYS.get(type(event))
    if transition is None:
        raise IllegalEvent(event, state)
    return transition(rules, state, event, now)


def _started(rules: Rules, state: State, event: Started, now: float) -> Result:
    seen = unseen(state)
    if state.phase == "training":
        return scheduled(rules, opened(rules, seen, now)), []
    return replace(seen, due=None if state.due is None else now + RETURN_S), []


def _reconnected(rules: Rules, state: State, event: Reconnected, now: float) -> Result:
    return _proceed(rules, unseen(state), now)


def _present(rules: Rules, state: State, event: Present, now: float) -> Result:
    return _proceed(rules, with_presence(state, event.participant, "here"), now)


def _absent(rules: Rules, state: State, event: Absent, now: float) -> Result:
    gone = event.for_good or state.devices.get(event.participant) == "gone"  # which falling silent does not undo
    return _proceed(rules, with_presence(state, event.participant, "gone" if gone else "away"), now)


def _restarted(rules: Rules, state: State, event: Restarted, now: float) -> Result:
    def others(known: Mapping[int, str]) -> dict[int, str]:
        return {participant: text for participant, text in known.items() if participant != event.participant}

    retried = tuple(participant for participant in state.retried if participant != event.participant)
    return _proceed(rules, replace(state, failed=others(state.failed), unfit=others(state.unfit), retried=retried), now)


def _prepared(rules: Rules, state: State, event: Prepared, now: float) -> Result:
    ready = replace(state, parts={**state.parts, **event.parts}, graphs={**state.graphs, **event.graphs})
    if rules.evaluate and not state.trained:
        return replace(ready, phase="evaluating"), []
    return _wait(rules, ready, now)


def _evaluated(rules: Rules, state: State, event: Evaluated, now: float) -> Result:
    if not state.trained:
        return _wait(rules, state, now)
    return _react(rules, state) if event.collapsed else _end_stage(rules, state)


def _contributed(rules: Rules, state: State, event: Contributed, now: float) -> Result:
    if event.participant not in state.owing:
        raise IllegalEvent(event, state)
    contributed = {**state.contributed, event.participant: event.contribution}
    pace = {**state.pace, **elapsed(state, [event.participant], now)}
    return _proceed(rules, replace(state, contributed=contributed, pace=pace), now)


def _refused(rules: Rules, state: State, event: Refused, now: float) -> Result:
    if event.participant not in state.owing:
        raise IllegalEvent(event, state)
    return _proceed(rules, replace(state, failed={**state.failed, event.participant: "refused"}), now)


def _counted(state: State, event: CannotTrain | RanShort | Unfit) -> State:
    """What arrives twice counts once, also where the device begins anew in between."""
    if event.participant not in state.owing or state.knows_failure(event.participant, event.attempt):
        raise IllegalEvent(event, state)
    return replace(state, attempts={**state.attempts, event.participant: event.attempt})


def _cannot_train(rules: Rules, state: State, event: CannotTrain, now: float) -> Result:
    return _proceed(rules, replace(_counted(state, event), failed={**state.failed, event.participant: "failed"}), now)


def _ran_short(rules: Rules, state: State, event: RanShort, now: float) -> Result:
    if event.participant in state.retried:
        return _cannot_train(rules, state, CannotTrain(event.participant, event.attempt), now)
    asked, retried = {**state.asked, event.participant: now}, (*state.retried, event.participant)
    return _proceed(rules, replace(_counted(state, event), asked=asked, retried=retried), now)


def _unfit(rules: Rules, state: State, event: Unfit, now: float) -> Result:
    counted = _counted(state, event)
    left = with_presence(replace(counted, unfit={**state.unfit, event.participant: event.reason}), event.participant, "gone")
    substitute = tuple(free(rules, left)[:1])
    chosen = tuple(sorted({*state.chosen, *substitute} - {event.participant}))
    joined: list[Notice] = [Joined(substitute)] if substitute else []
    asked = {**state.asked, **dict.fromkeys(substitute, now)}
    needed = min(state.needed, rules.needed(len(chosen)))
    return _with(joined, _proceed(rules, replace(left, chosen=chosen, asked=asked, needed=needed), now))


def _waited(rules: Rules, state: State, event: TimeUp, now: float) -> Result:
    """Go on without those who did not return, as soon as a quorum is there."""
    if state.paused:
        raise IllegalEvent(event, state)
    missing = [participant for participant, there in state.devices.items() if there == "away"]
    given_up = replace(state, devices={**state.devices, **dict.fromkeys(missing, "gone")}, due=now + RETURN_S, patient=False)
    following, notices = _proceed(rules, given_up, now)
    return following, [*(GivenUp(participant) for participant in missing), *notices]


def _overdue(rules: Rules, state: State, event: TimeUp, now: float) -> Result:
    if now >= state.deadline:
        return _deadline(rules, state, now)
    slow = [one for one in state.expected if own_deadline(rules, state, one) <= now]
    overdue: list[Notice] = [Overdue(one, state.pace[one]) for one in slow]
    return _with(overdue, _proceed(rules, replace(state, stragglers=tuple(sorted((*state.stragglers, *slow)))), now))


def _deadline(rules: Rules, state: State, now: float) -> Result:
    if len(state.contributed) >= state.needed:
        return _close(state, now)
    refused = {participant: how for participant, how in state.failed.items() if how == "refused"}
    following, notices = assign_more(rules, opened(rules, replace(state, failed=refused), now), now, overdue=True)
    if not notices:
        following = replace(following, needed=_attainable(rules, following))
        if len(following.contributed) >= following.needed:
            return _close(following, now)
    ready = [participant for participant in following.owing if participant in following.here]
    if len(following.contributed) + len(ready) < following.needed:
        following = replace(following, failed={})
    return scheduled(rules, following), [Extended(state.stage, state.round, len(state.contributed), state.needed), *notices]


def _attainable(rules: Rules, state: State) -> int:
    """The quorum of those chosen that are there or have contributed, where it is less, but never less than a round begins with."""
    there = [one for one in state.chosen if one in state.contributed or state.devices.get(one) == "here"]
    return min(state.needed, max(rules.needed(len(there)), rules.gathering(state.begun)))


def _aggregated(rules: Rules, state: State, event: Aggregated, now: float) -> Result:
    merged = replace(_moved(state, event), losses={**state.losses, state.round: event.loss})
    if rules.calibrates(merged):
        return replace(merged, phase="calibrating"), []
    return _end_round(rules, merged, now)


def _calibrated(rules: Rules, state: State, event: Calibrated, now: float) -> Result:
    return _end_round(rules, _moved(state, event), now)


def _moved(state: State, event: Aggregated | Calibrated) -> State:
    steps = {part: (*state.patches.get(part, ()), step)[-KEPT_PATCHES:] for part, step in event.patches.items()}
    return replace(
        state,
        parts={**state.parts, **event.parts},
        patches={**state.patches, **steps},
        residuals={**state.residuals, **event.residuals},
    )


def _paused(rules: Rules, state: State, event: Paused, now: float) -> Result:
    if state.over:
        return state, []
    withdrawn = state.phase == "training" and event.withdraw
    held = withdrawn or state.phase == "waiting"
    return replace(state, paused=True, phase="waiting" if withdrawn else state.phase, due=None if held else state.due), []


def _resumed(rules: Rules, state: State, event: Resumed, now: float) -> Result:
    if not state.paused:
        return state, []
    resumed = replace(state, paused=False)
    if state.suspended:
        return _proceed(rules, opened(rules, resumed, now), now)
    return _wait(rules, resumed, now) if state.phase == "waiting" else (resumed, [])


TRANSITIONS: dict[tuple[str, type[Event]], Transition] = {
    ("preparing", Prepared): _prepared,
    ("evaluating", Evaluated): _evaluated,
    ("waiting", TimeUp): _waited,
    ("training", Contributed): _contributed,
    ("training", Refused): _refused,
    ("training", CannotTrain): _cannot_train,
    ("training", RanShort): _ran_short,
    ("training", Unfit): _unfit,
    ("training", TimeUp): _overdue,
    ("aggregating", Aggregated): _aggregated,
    ("calibrating", Calibrated): _calibrated,
}
ALWAYS: dict[type[Event], Transition] = {
    Started: _started,
    Reconnected: _reconnected,
    Present: _present,
    Absent: _absent,
    Restarted: _restarted,
    Paused: _paused,
    Resumed: _resumed,
}


def _proceed(rules: Rules, state: State, now: float) -> Result:
    """What follows by itself when devices come, go or answer."""
    if state.phase == "waiting" and not state.paused and _enough(rules, state):
        return _begin(rules, state, now)
    if state.phase == "training":
        state, notices = assign_more(rules, state, now)
        return _close(state, now) if rules.completes(state) else (scheduled(rules, state), notices)
    return state, []


def _enough(rules: Rules, state: State) -> bool:
    hoping = state.patient and "away" in state.devices.values()
    return len(state.here) >= rules.gathering(state.begun) and not hoping


def _wait(rules: Rules, state: State, now: float) -> Result:
    due = None if state.paused else now + RETURN_S
    return _proceed(rules, replace(_between_rounds(state), phase="waiting", due=due, patient=True), now)


def _begin(rules: Rules, state: State, now: float) -> Result:
    chosen = sample(rules.seed, state.stage, state.round, state.here, rules.selected)
    begun = replace(
        opened(rules, state, now),
        begun=True,
        announced=state.parts,
        chosen=chosen,
        needed=rules.needed(len(chosen)),
        asked=dict.fromkeys(chosen, now),
    )
    return scheduled(rules, begun), [Begun(state.stage, state.round, chosen)]


def _close(state: State, now: float) -> Result:
    closed = replace(state, phase="aggregating", due=None, trained=True, pace={**state.pace, **slowed(state, now)})
    return closed, [Closed(state.stage, state.round, len(state.contributed))]


def _end_round(rules: Rules, state: State, now: float) -> Result:
    if not rules.ends_stage(state):
        following = replace(state, round=state.round + 1)
        scale = rules.lr_scale(following)
        reduced = [Reduced(state.stage, state.round, scale)] if scale < rules.lr_scale(state) else []
        return _with(reduced, _wait(rules, following, now))
    early = state.round < rules.last_round(state.stage, state.round)
    stalled = [Stalled(state.stage, state.round)] if early else []
    return _with(stalled, (replace(state, phase="evaluating"), []) if rules.judge else _end_stage(rules, state))


def _react(rules: Rules, state: State) -> Result:
    """The stage that ends has collapsed."""
    last = rules.on_collapse == "repeat" and state.attempt == MAX_ATTEMPTS
    reaction: Reaction = "stop" if last else rules.on_collapse
    collapsed: list[Notice] = [Collapsed(state.stage, state.attempt, reaction)]
    match reaction:
        case "warn":
            return _with(collapsed, _end_stage(rules, state))
        case "repeat":
            first = rules.last_round(state.stage, state.round) + 1
            anew = replace(_cleared(state), attempt=state.attempt + 1, round=first, parts=state.start, patches={})
            return replace(anew, phase="preparing"), collapsed
        case "stop":
            return replace(_cleared(state), phase="stopped"), collapsed


def _end_stage(rules: Rules, state: State) -> Result:
    fresh = _cleared(state)
    if state.stage == rules.stages:
        return replace(fresh, phase="finished"), []
    kept = {part: blob for part, blob in state.parts.items() if part in rules.parts[state.stage]}  # of the next stage
    patches = {part: steps for part, steps in state.patches.items() if part in kept}
    return replace(fresh, phase="preparing", stage=state.stage + 1, attempt=1, round=1, parts=kept, start=kept, patches=patches), []


def _cleared(state: State) -> State:
    """Without what is of one attempt."""
    return replace(_between_rounds(state), due=None, losses={}, announced={}, residuals={})


def _between_rounds(state: State) -> State:
    """Without what is of one round."""
    return replace(state, chosen=(), contributed={}, failed={}, attempts={}, retried=(), needed=0, asked={}, stragglers=())


def _with(notices: Sequence[Notice], result: Result) -> Result:
    """`result`, with what is to be said before it."""
    return result[0], [*notices, *result[1]]
