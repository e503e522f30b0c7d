"""The coordinator driven by hand: what its tests share."""

import hashlib

from lwfed.cloud_server.coordinator import advance
from lwfed.cloud_server.duty import Aggregate, Calibrate, Evaluate, Prepare, duty
from lwfed.cloud_server.events import Aggregated, Calibrated, Contributed, Evaluated, Prepared, Present
from lwfed.cloud_server.rounds import Rules, State

RULES = Rules(
    seed=0, stages=2, rounds=(2, 2), parts=(("stem", "layer.1", "adapter.1"), ("stem", "layer.1", "layer.2")), min_devices=2,
    sample=None, oversample=1.0, quorum=0.5, deadline_s=100.0, straggler_factor=None, calibrate="round", evaluate=True, judge=True,
    patience=None, plateau_rounds=None, plateau_factor=0.5, on_collapse="warn",
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
