"""What happens to a run, as the coordinator is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lwfed.cloud_server.rounds import State, Step
from lwfed.plan import GraphEngine


class Event:
    """Something that happened to the run."""


class IllegalEvent(RuntimeError):
    """The shell handed over what cannot happen now: a fault of the program, not of a device."""

    def __init__(self, event: Event, state: State) -> None:
        super().__init__(f"the coordinator cannot take {event} in phase {state.phase} of stage {state.stage}, round {state.round}")


@dataclass(frozen=True)
class Started(Event):
    """The server runs (again): who is there must be seen anew, and clocks begin anew."""


@dataclass(frozen=True)
class Reconnected(Event):
    """The server lost its connection: a device that went meanwhile may not be missed by the broker, so who is there must be seen anew."""


@dataclass(frozen=True)
class Present(Event):
    participant: int


@dataclass(frozen=True)
class Absent(Event):
    participant: int
    for_good: bool  # it said goodbye, instead of just falling silent


@dataclass(frozen=True)
class Restarted(Event):
    """A device began anew: what it could not do before, it perhaps can do now."""

    participant: int


@dataclass(frozen=True)
class TimeUp(Event):
    """`state.due` has come."""


@dataclass(frozen=True)
class Prepared(Event):
    parts: dict[str, str]  # part -> blob
    graphs: dict[GraphEngine, str] = field(default_factory=dict)  # those that the run did not have


@dataclass(frozen=True)
class Evaluated(Event):
    collapsed: bool | None = None  # None: that could not be judged


@dataclass(frozen=True)
class Contributed(Event):
    participant: int
    contribution: str


@dataclass(frozen=True)
class Refused(Event):
    """We found its update wrong: after the deadline others are asked before it."""

    participant: int


@dataclass(frozen=True)
class CannotTrain(Event):
    participant: int
    attempt: int  # of the device, in the round


@dataclass(frozen=True)
class RanShort(Event):
    """A device ran out of memory, and has planned to take less: it is asked once more in the round."""

    participant: int
    attempt: int


@dataclass(frozen=True)
class Unfit(Event):
    """A chosen device turned out to be none that can train, in this round or a later one: the round goes on with another in its place."""

    participant: int
    reason: str
    attempt: int


@dataclass(frozen=True)
class Aggregated(Event):
    parts: dict[str, str]  # those that changed
    loss: float  # of the round, mean by images
    patches: dict[str, Step] = field(default_factory=dict)  # to them from those that the round began with
    residuals: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibrated(Event):
    parts: dict[str, str]  # those that changed
    patches: dict[str, Step] = field(default_factory=dict)
    residuals: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Paused(Event):
    """The operator wants no further round to begin."""

    withdraw: bool  # nor the present one to go on


@dataclass(frozen=True)
class Resumed(Event):
    """The operator wants the run to go on."""
