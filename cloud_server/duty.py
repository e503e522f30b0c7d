"""What a phase wants done: a function of the stored state, so that after a crash it is done again."""

from __future__ import annotations

from dataclasses import dataclass

from lwfed.cloud_server.rounds import State


@dataclass(frozen=True)
class Prepare:
    stage: int
    attempt: int


@dataclass(frozen=True)
class Evaluate:
    stage: int
    baselines: bool  # the random encoder and raw pixels, instead of the trained encoder


@dataclass(frozen=True)
class Aggregate:
    stage: int
    contributions: dict[int, str]


@dataclass(frozen=True)
class Calibrate:
    stage: int
    round: int


@dataclass(frozen=True)
class Export:
    pass


Duty = Prepare | Evaluate | Aggregate | Calibrate | Export


def duty(state: State) -> Duty | None:
    """What the server must do in this phase; None while it waits for devices."""
    match state.phase:
        case "preparing":
            return Prepare(state.stage, state.attempt)
        case "evaluating":
            return Evaluate(state.stage, baselines=not state.trained)
        case "aggregating":
            return Aggregate(state.stage, dict(sorted(state.contributed.items())))
        case "calibrating":
            return Calibrate(state.stage, state.round)
        case "finished" | "stopped":
            return Export()
    return None
