"""What has happened to a run, as the coordinator lets people and the store know. The state says what is to be done."""

from __future__ import annotations

from dataclasses import dataclass

from lwfed.cloud_server.rounds import Reaction


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
class Overdue:
    """A device is over its own deadline: it is a straggler."""

    participant: int
    pace_s: float


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


@dataclass(frozen=True)
class Reduced:
    """The loss no longer falls: the learning rate of the rounds that follow is this part of its own."""

    stage: int
    round: int
    lr_scale: float


@dataclass(frozen=True)
class Stalled:
    """The loss no longer falls: the stage ends before its last round."""

    stage: int
    round: int


@dataclass(frozen=True)
class Collapsed:
    """The features of the stage are all alike."""

    stage: int
    attempt: int
    reaction: Reaction  # repeat: the stage begins anew; stop: also after the last attempt


Notice = Begun | Joined | Overdue | Extended | Closed | GivenUp | Reduced | Stalled | Collapsed
