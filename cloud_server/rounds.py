"""What the coordinator decides on and remembers: the rules of a run, its state, and what it lets others know."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from lwfed.cloud_server.sampling import ranked
from lwfed.config import RunConfig
from lwfed.wire.messages import Phase

Presence = Literal["here", "away", "gone"]  # away: fell silent and may return; gone: said goodbye, or was waited for in vain


class Event:
    """Something that happened to the run."""


class IllegalEvent(RuntimeError):
    """The shell handed over what cannot happen now: a fault of the program, not of a device."""

    def __init__(self, event: Event, state: State) -> None:
        super().__init__(f"the coordinator cannot take {event} in phase {state.phase} of stage {state.stage}, round {state.round}")


@dataclass(frozen=True)
class Rules:
    """What the configuration says about the course of a run."""

    seed: int
    stages: int
    rounds: tuple[int, ...]  # of each stage
    min_devices: int
    sample: int | None
    quorum: float
    deadline_s: float
    calibrate: Literal["round", "stage", "never"] | int
    evaluate: bool

    @classmethod
    def of(cls, config: RunConfig) -> Rules:
        rounds = config.rounds
        return cls(
            seed=config.run.seed,
            stages=config.stage_count,
            rounds=config.round_counts,
            min_devices=rounds.min_devices,
            sample=rounds.sample,
            quorum=rounds.quorum,
            deadline_s=rounds.deadline_s,
            calibrate=config.calibration.every,
            evaluate=config.evaluation.data is not None,
        )

    def rounds_of(self, stage: int) -> int:
        return self.rounds[stage - 1]

    def calibrates(self, stage: int, round: int) -> bool:
        if isinstance(self.calibrate, int):
            return round % self.calibrate == 0
        return self.calibrate == "round" or (self.calibrate == "stage" and round == self.rounds_of(stage))

    def quorum_of(self, count: int) -> int:
        return max(1, math.ceil(self.quorum * count - 1e-9))  # 0.1 * 30 must not need four

    def gathering(self, begun: bool) -> int:
        """How many devices must be there for a round to begin; the first one wants all that were asked for."""
        return self.quorum_of(self.min_devices) if begun else self.min_devices


@dataclass(frozen=True)
class State:
    """Where the run stands; all of it is stored."""

    phase: Phase = "preparing"
    stage: int = 1
    round: int = 1
    parts: dict[str, str] = field(default_factory=dict)  # part -> blob: the current model
    devices: dict[int, Presence] = field(default_factory=dict)  # participant -> seen how
    begun: bool = False  # a first round has been opened
    trained: bool = False  # a first round has been closed
    patient: bool = True  # waiting: still hoping for those who are away
    chosen: tuple[int, ...] = ()
    needed: int = 0  # contributions that make the round valid
    contributed: dict[int, str] = field(default_factory=dict)  # participant -> contribution
    failed: dict[int, str] = field(default_factory=dict)  # participant -> "failed" | "refused"
    due: float | None = None  # when waiting or training has lasted long enough, by the caller's clock

    @property
    def here(self) -> list[int]:
        return sorted(participant for participant, there in self.devices.items() if there == "here")

    @property
    def owing(self) -> tuple[int, ...]:
        """Chosen ones from whom an update may still come."""
        if self.phase != "training":
            return ()
        return tuple(one for one in self.chosen if one not in self.contributed and one not in self.failed)

    @property
    def expected(self) -> tuple[int, ...]:
        """Those among them that are worth waiting for: all but who said goodbye."""
        return tuple(one for one in self.owing if self.devices.get(one) != "gone")

    @property
    def stuck(self) -> bool:
        """Training, and nobody is left who could still contribute: free devices are asked as soon as they are needed."""
        return self.phase == "training" and not self.expected

    def waits_for(self, participant: int) -> bool:
        away = self.phase == "waiting" and self.devices.get(participant) == "away"
        return away or participant in self.expected

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> State:
        data = json.loads(text)
        for key in ("devices", "contributed", "failed"):
            data[key] = {int(participant): value for participant, value in data[key].items()}
        return cls(**{**data, "chosen": tuple(data["chosen"])})


# Notices: what happened, for people and for the store. The state says what is to be done.


@dataclass(frozen=True)
class Begun:
    stage: int
    round: int
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class Joined:
    """Further devices were chosen in place of those that cannot train."""

    participants: tuple[int, ...]


@dataclass(frozen=True)
class Extended:
    """The deadline passed without a quorum."""

    stage: int
    round: int
    contributions: int
    needed: int


@dataclass(frozen=True)
class Closed:
    stage: int
    round: int
    devices: int


@dataclass(frozen=True)
class GivenUp:
    """A device that was away did not return in time; the run goes on without it until it does."""

    participant: int


Notice = Begun | Joined | Extended | Closed | GivenUp

# Duties: what a phase wants done.


@dataclass(frozen=True)
class Prepare:
    stage: int


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
            return Prepare(state.stage)
        case "evaluating":
            return Evaluate(state.stage, baselines=not state.trained)
        case "aggregating":
            return Aggregate(state.stage, dict(sorted(state.contributed.items())))
        case "calibrating":
            return Calibrate(state.stage, state.round)
        case "finished":
            return Export()
    return None


def with_presence(state: State, participant: int, presence: Presence) -> State:
    return replace(state, devices={**state.devices, participant: presence})


def assign_more(rules: Rules, state: State, ignore_away: bool = False) -> tuple[State, list[Notice]]:
    """Choose further devices when those chosen can no longer make a quorum; with `ignore_away`, silent ones do not count."""
    hopeful = [one for one in state.expected if not (ignore_away and state.devices.get(one) != "here")]
    lacking = state.needed - len(state.contributed) - len(hopeful)
    free = [one for one in ranked(rules.seed, state.stage, state.round, state.here) if one not in state.chosen]
    extra = tuple(free[: max(0, lacking)])
    if not extra:
        return state, []
    return replace(state, chosen=tuple(sorted((*state.chosen, *extra)))), [Joined(extra)]
