"""What the coordinator decides on and remembers: the rules of a run, and its state."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal

from lwfed.cloud_server.plateau import plateaus
from lwfed.config import RunConfig
from lwfed.plan import GraphEngine
from lwfed.wire.messages import Phase

Presence = Literal["here", "away", "gone"]  # away: fell silent and may return; gone: said goodbye, or was waited for in vain
Reaction = Literal["warn", "repeat", "stop"]  # to a stage that collapsed

Step = tuple[str, str]  # (blob that it applies to, differences)

MAX_ATTEMPTS = 3  # at a stage, with on_collapse: repeat


@dataclass(frozen=True)
class Rules:
    """What the configuration says about the course of a run."""

    seed: int
    stages: int
    rounds: tuple[int, ...]  # of each stage, at most
    parts: tuple[tuple[str, ...], ...]  # that the model has in each stage
    min_devices: int
    sample: int | None
    oversample: float
    quorum: float
    deadline_s: float
    straggler_factor: float | None
    calibrate: Literal["round", "stage", "never"] | int
    evaluate: bool  # there are labelled images
    judge: bool  # there are images, labelled or not, to see by whether a stage has collapsed
    patience: int | None  # rounds without a lower loss that end a stage
    plateau_rounds: int | None  # rounds without a lower loss after which the learning rate ...
    plateau_factor: float  # ... is multiplied by this
    on_collapse: Reaction

    @classmethod
    def of(cls, config: RunConfig) -> Rules:
        rounds, stages, train = config.rounds, config.stages, config.train
        return cls(
            seed=config.run.seed,
            stages=config.stage_count,
            rounds=config.round_counts,
            parts=tuple(config.plan(stage).present for stage in range(1, config.stage_count + 1)),
            min_devices=rounds.min_devices,
            sample=rounds.sample,
            oversample=rounds.oversample,
            quorum=rounds.quorum,
            deadline_s=rounds.deadline_s,
            straggler_factor=rounds.straggler_factor,
            calibrate=config.calibration.every,
            evaluate=config.evaluation.data is not None,
            judge=config.evaluation.data is not None or config.calibration.every != "never",
            patience=stages.patience if stages.advance == "plateau" else None,
            plateau_rounds=train.plateau_rounds if train.lr_schedule == "plateau" else None,
            plateau_factor=train.plateau_factor,
            on_collapse=stages.on_collapse,
        )

    def last_round(self, stage: int, round: int) -> int:
        """Of the attempt at the stage that `round` belongs to, as planned; attempts go on counting rounds."""
        planned = self.rounds[stage - 1]
        return -(-round // planned) * planned

    def ends_stage(self, state: State) -> bool:
        """Whether no round of this attempt follows; for a round whose loss is known."""
        stalled = self.patience is not None and plateaus(state.losses.values(), self.patience) > 0
        return stalled or state.round == self.last_round(state.stage, state.round)

    def lr_scale(self, state: State) -> float:
        """What is left of the learning rate in this round, after the plateaus among the rounds of the attempt before it."""
        if self.plateau_rounds is None:
            return 1.0
        before = [loss for round, loss in state.losses.items() if round < state.round]
        return self.plateau_factor ** plateaus(before, self.plateau_rounds)

    def calibrates(self, state: State) -> bool:
        """Whether this round ends with calibration; for a round whose loss is known."""
        if isinstance(self.calibrate, int):
            in_attempt = (state.round - 1) % self.rounds[state.stage - 1] + 1
            return in_attempt % self.calibrate == 0
        return self.calibrate == "round" or (self.calibrate == "stage" and self.ends_stage(state))

    def quorum_of(self, count: int) -> int:
        return max(1, math.ceil(self.quorum * count - 1e-9))  # 0.1 * 30 must not need four

    @property
    def selected(self) -> int | None:
        """How many devices a round chooses; None: all that are there."""
        return None if self.sample is None else math.ceil(self.sample * self.oversample - 1e-9)

    def needed(self, chosen: int) -> int:
        """Contributions that make a round of so many chosen devices valid; those over-selected raise it not."""
        return self.quorum_of(chosen if self.sample is None else min(chosen, self.sample))

    def completes(self, state: State) -> bool:
        """Whether the round has a quorum and nobody left to wait for, or, over-selected, all that it was to have."""
        count = len(state.contributed)
        enough = self.sample is not None and self.oversample > 1 and count >= self.sample
        return enough or (count >= state.needed and not state.expected)

    def gathering(self, begun: bool) -> int:
        """How many devices must be there for a round to begin; the first one wants all that were asked for."""
        return self.quorum_of(self.min_devices) if begun else self.min_devices


@dataclass(frozen=True)
class State:
    """Where the run stands; all of it is stored."""

    phase: Phase = "preparing"
    stage: int = 1
    attempt: int = 1  # at the stage
    round: int = 1  # of the stage, over all attempts
    parts: dict[str, str] = field(default_factory=dict)  # part -> blob: the current model
    start: dict[str, str] = field(default_factory=dict)  # the model as the stage found it
    announced: dict[str, str] = field(default_factory=dict)  # the model that the devices of the round received
    patches: dict[str, tuple[Step, ...]] = field(default_factory=dict)  # part -> the way to it from what it was in rounds before
    residuals: dict[str, str] = field(default_factory=dict)  # part -> blob: what the last of them could not say
    graphs: dict[GraphEngine, str] = field(default_factory=dict)  # engine -> blob: what it runs a frozen layer by
    losses: dict[int, float] = field(default_factory=dict)  # round of this attempt -> mean loss
    devices: dict[int, Presence] = field(default_factory=dict)  # participant -> seen how
    begun: bool = False  # a first round has been opened
    trained: bool = False  # a first round has been closed
    patient: bool = True  # waiting: still hoping for those who are away
    chosen: tuple[int, ...] = ()
    needed: int = 0  # contributions that make the round valid
    contributed: dict[int, str] = field(default_factory=dict)  # participant -> contribution
    failed: dict[int, str] = field(default_factory=dict)  # participant -> "failed" | "refused"
    attempts: dict[int, int] = field(default_factory=dict)  # participant -> its last attempt at the round that failed, as it says
    retried: tuple[int, ...] = ()  # ran out of memory, and are asked once more
    unfit: dict[int, str] = field(default_factory=dict)  # participant -> why it is not asked until it begins anew
    pace: dict[int, float] = field(default_factory=dict)  # participant -> seconds from its task to its update, the last time
    asked: dict[int, float] = field(default_factory=dict)  # participant -> when it was chosen; absent where a restart came between
    stragglers: tuple[int, ...] = ()  # chosen, over their own deadline: an update of theirs still counts while the round is open
    deadline: float = 0.0  # of the round under way
    due: float | None = None  # when waiting or training has lasted long enough for something to follow; times by the caller's clock
    paused: bool = False  # by the operator: no round begins

    @property
    def here(self) -> list[int]:
        return sorted(participant for participant, there in self.devices.items() if there == "here")

    @cached_property
    def owing(self) -> tuple[int, ...]:
        """Chosen ones from whom an update may still come."""
        if self.phase != "training":
            return ()
        return tuple(one for one in self.chosen if one not in self.contributed and one not in self.failed)

    @cached_property
    def expected(self) -> tuple[int, ...]:
        """Those among them that are waited for: all but who said goodbye and stragglers."""
        return tuple(one for one in self.owing if self.devices.get(one) != "gone" and one not in self.stragglers)

    @property
    def suspended(self) -> bool:
        """Paused within a round, which keeps the updates that it has."""
        return self.phase == "waiting" and bool(self.chosen)

    @property
    def over(self) -> bool:
        return self.phase in ("finished", "stopped")

    @property
    def sound_stage(self) -> int:
        """The last stage whose model may be built upon, once the run is over; 0: there is none."""
        return self.stage - 1 if self.phase == "stopped" else self.stage

    @property
    def stuck(self) -> bool:
        """Training, and nobody is left who could still contribute: free devices are asked as soon as they are needed."""
        return self.phase == "training" and all(self.devices.get(one) == "gone" for one in self.owing)

    def knows_failure(self, participant: int, attempt: int) -> bool:
        """Whether this attempt at the round is known to have failed, or a later one."""
        return attempt <= self.attempts.get(participant, 0)

    def waits_for(self, participant: int) -> bool:
        away = self.phase == "waiting" and self.devices.get(participant) == "away"
        return away or participant in self.expected

    def to_json(self) -> str:
        return json.dumps({one.name: getattr(self, one.name) for one in fields(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> State:
        data = {**json.loads(cls().to_json()), **json.loads(text)}  # one of an older program lacks what came later
        data["attempts"] = data["attempts"] or dict.fromkeys(data["retried"], 1)  # of a program that did not count them
        for key in ("devices", "contributed", "failed", "attempts", "unfit", "losses", "pace", "asked"):
            data[key] = {int(number): value for number, value in sorted(data[key].items(), key=lambda item: int(item[0]))}
        data["patches"] = {part: tuple((base, blob) for base, blob in steps) for part, steps in data["patches"].items()}
        return cls(**{**data, **{key: tuple(data[key]) for key in ("chosen", "retried", "stragglers")}})


def with_presence(state: State, participant: int, presence: Presence) -> State:
    if state.devices.get(participant) == presence:
        return state
    return replace(state, devices={**state.devices, participant: presence})


def unseen(state: State) -> State:
    """With all devices away that are not known to have gone."""
    return replace(state, devices={one: "away" if there == "here" else there for one, there in state.devices.items()})
