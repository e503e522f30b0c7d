"""What is said when the run has moved: derived from the coordinator's state before and after."""

from __future__ import annotations

from lwfed.cloud_server.coordinator import RETURN_S
from lwfed.cloud_server.course import Course
from lwfed.cloud_server.news import News
from lwfed.cloud_server.notices import Begun, Closed, Collapsed, Extended, GivenUp, Joined, Notice, Overdue, Reduced, Stalled
from lwfed.cloud_server.orders import to_go_on
from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.sizes import round_bytes


def tell(news: News, course: Course, before: State, notices: list[Notice], now: float) -> None:
    after = course.state
    if before.phase == "preparing" != after.phase:
        news.stage_started(course.rules, course.plan, after.attempt, *round_bytes(course.plan, course.config.transfer.codec, course.shapes))
    for notice in notices:
        _notice(news, course, notice)
    if after.stage > before.stage or (after.over and not before.over):
        stage_ended(news, course, before.stage)
    if after.paused != before.paused:
        news.paused(after, to_go_on(course.root, course.store.database.path is None))
    if after.phase == "waiting" and (before.phase != "waiting" or before.here != after.here or before.patient != after.patient):
        waiting(news, course, now)
    if after.stuck and not before.stuck:
        news.stuck(after, now)


def waiting(news: News, course: Course, now: float) -> None:
    """Whom the run waits for; nothing while it does not wait."""
    state = course.state
    if state.stuck:
        news.stuck(state, now)
    if state.phase != "waiting" or state.paused:
        return
    needed = course.rules.gathering(state.begun)
    if len(state.here) < needed:
        news.waiting(len(state.here), needed, now)
    elif away := [participant for participant, there in state.devices.items() if there == "away"]:
        news.waiting_for(away, RETURN_S, now)


def place(course: Course) -> str:
    state, rules = course.state, course.rules
    return f"stage {state.stage} of {rules.stages}, round {state.round} of {rules.last_round(state.stage, state.round)}, {state.phase}"


def say_over(news: News, course: Course) -> None:
    """How the run ended, and the encoder that it leaves."""
    encoder = course.export()
    started, ended = course.store.times
    seconds = (ended or started) - started
    if course.state.phase == "stopped":
        news.stopped(stop_reason(course.state), course.state.sound_stage, encoder, seconds)
    elif encoder:
        news.finished(encoder, seconds)


def stop_reason(state: State) -> str:
    """Why a run in phase stopped is."""
    tries = "" if state.attempt == 1 else f" in each of {state.attempt} attempts"
    return f"stage {state.stage} collapsed{tries}: its features are all alike"


def stage_ended(news: News, course: Course, stage: int) -> None:
    began = course.store.stage_began_s(stage)
    seconds = course.clock() - began if began is not None else 0.0
    scores = course.store.scores().get((stage, "trained"))
    news.stage_ended(course.rules, stage, max(0.0, seconds), scores, course.store.figures(stage))


def _notice(news: News, course: Course, notice: Notice) -> None:
    match notice:
        case Begun(stage, round, chosen):
            news.round_started(course.rules, stage, round, chosen)
        case Joined(participants):
            listed = ", ".join(map(str, participants))
            news.warning(f"asked device {listed} to train as well, in place of those that cannot")
        case Overdue(participant, pace_s):
            news.overdue(course.rules, participant, pace_s)
        case Extended(_, round, contributions, needed):
            news.warning(f"round {round}: {contributions} updates at the deadline and {needed} are needed: waiting as long again")
        case Closed(stage, round, devices):
            news.round_closed(course.rules, stage, round, devices, course.store.loss(stage, round))
        case Reduced(stage, round, lr_scale):
            news.reduced(stage, round, lr_scale)
        case Stalled(stage, round):
            news.stalled(course.rules, stage, round)
        case Collapsed(stage, attempt, reaction):
            news.collapsed(stage, attempt, reaction)
        case GivenUp(participant):
            news.warning(f"device {participant} has not come back; going on without it until it does")
