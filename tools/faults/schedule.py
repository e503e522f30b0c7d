"""What happens to a fleet, drawn from one seed: its size and settings, and the faults, by virtual time.

Faults stop at `calm_s`: from then on everything works, so that a run which does not end has been blocked by what was before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from lwfed.child import END_KINDS
from lwfed.config import RunConfig
from lwfed.seeds import derive

SERVER = -1  # as a party; devices are numbered from 0
Point = Literal["anywhere", "uncommitted", "unpublished"]  # in a transaction; between a transaction and what is said of it

LONGEST_S = 200.0  # of faults; a large run without any takes half of it
MOST_FAULTS = 12
LARGE = 0.1  # of schedules: what goes wrong after many rounds takes one; a small one takes half the time
FEW_ROUNDS = ((1, 1), (1, 1), (1, 2), (2, 1))  # of two stages


@dataclass(frozen=True)
class Weather:
    """What befalls messages on their way to subscribers, until `ends_s`."""

    at_s: float
    ends_s: float
    drop: float
    duplicate: float
    reorder: float
    delay_s: float


@dataclass(frozen=True)
class Cut:
    """A connection breaks, with or without the last will, and is not to be had for a while."""

    at_s: float
    party: int
    for_s: float
    will: bool


@dataclass(frozen=True)
class Stall:
    """Nothing passes, and nobody notices. Half-open: it never does, and the connection breaks in the end."""

    at_s: float
    party: int
    for_s: float
    half_open: bool


@dataclass(frozen=True)
class Kill:
    """A process dies; it is started again after a while."""

    at_s: float
    party: int
    for_s: float
    point: Point
    skip: int  # so many times the point is passed
    power: bool  # the machine with it: what was not synced is lost, and the broker notices late
    disk: bool  # of a device: all that it had is lost too, its identity included


@dataclass(frozen=True)
class Anew:
    """The server is ended, its state deleted, and it is started for another run of the same name, with other weights."""

    at_s: float
    for_s: float
    seed: int  # of the other run


@dataclass(frozen=True)
class Leave:
    """A device is ended by its owner, says goodbye, and is started again much later."""

    at_s: float
    party: int
    for_s: float


@dataclass(frozen=True)
class BrokerCrash:
    at_s: float
    for_s: float
    persistent: bool  # what is retained outlasts it


@dataclass(frozen=True)
class Fail:
    """The next jobs of a worker end so."""

    at_s: float
    party: int
    kinds: tuple[str, ...]


Fault = Weather | Cut | Stall | Kill | Anew | Leave | BrokerCrash | Fail


@dataclass(frozen=True)
class Schedule:
    seed: int
    devices: int
    settings: dict[str, dict[str, Any]]  # section -> key -> value, where they differ from the base
    faults: tuple[Fault, ...]
    calm_s: float

    def config(self, base: RunConfig) -> RunConfig:
        known = base.model_dump()
        return RunConfig.model_validate({section: {**keys, **self.settings.get(section, {})} for section, keys in known.items()})


def draw(seed: int) -> Schedule:
    random = Random(derive(seed, "faults"))
    large = random.random() < LARGE
    devices = random.choice((2, 3, 4, 5) if large else (2, 2, 2, 3))
    rounds = tuple(random.choice((1, 2, 3)) for _ in range(random.choice((2, 3)))) if large else random.choice(FEW_ROUNDS)
    settings = _settings(random, devices, rounds)
    calm_s = random.uniform(20.0, LONGEST_S if large else LONGEST_S / 2)
    count = random.randint(0, MOST_FAULTS)
    faults = [random.choice(KINDS)(random, random.uniform(0.0, calm_s), calm_s, devices) for _ in range(count)]
    return Schedule(seed, devices, settings, tuple(sorted(faults, key=lambda fault: fault.at_s)), calm_s)


def _settings(random: Random, devices: int, rounds: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    least = random.randint(2, devices)
    calibration = random.choice(("never", "never", "round", "stage"))
    codec = random.choice(("fp32", "int8", "int8", "bf16"))
    return {
        "run": {"seed": random.randrange(2**31)},
        "model": {"depth": len(rounds)},
        "stages": {
            "strategy": random.choice(("layer_wise", "layer_wise", "progressive")),
            "rounds_per_stage": rounds,
        },
        "rounds": {
            "min_devices": least,
            "sample": random.choice((None, random.randint(1, least))),
            "quorum": random.choice((0.3, 0.5, 1.0)),
            "deadline_s": random.choice((40.0, 120.0, 300.0)),
        },
        "calibration": {"every": calibration, "scope": random.choice(("model", "active"))},
        "transfer": {
            "codec": codec,
            "top_k": 1.0 if codec == "fp32" else random.choice((1.0, 0.3)),
            "chunk_bytes": random.choice((1024, 4096)),
            "upload_slots": random.choice((1, 2, 8)),
            "window": random.choice((1, 4)),
        },
        "worker": {"linger_s": random.choice((0.0, 60.0))},
    }


def _weather(random: Random, at_s: float, calm_s: float, devices: int) -> Weather:
    def chance(*values: float) -> float:
        return random.choice((0.0, *values))

    ends_s = random.uniform(at_s, calm_s)
    return Weather(at_s, ends_s, chance(0.02, 0.1, 0.3), chance(0.1, 0.3), chance(0.1, 0.5), chance(0.2, 2.0, 20.0))


def _cut(random: Random, at_s: float, calm_s: float, devices: int) -> Cut:
    return Cut(at_s, _party(random, devices), _while(random), will=random.random() < 0.7)


def _stall(random: Random, at_s: float, calm_s: float, devices: int) -> Stall:
    return Stall(at_s, _party(random, devices), random.uniform(1.0, 90.0), half_open=random.random() < 0.5)


def _kill(random: Random, at_s: float, calm_s: float, devices: int) -> Kill:
    party = _party(random, devices)
    point: Point = random.choice(("anywhere", "uncommitted", "unpublished"))
    power = random.random() < 0.5
    disk = power and party != SERVER and random.random() < 0.2
    return Kill(at_s, party, _while(random), point, random.randint(0, 5), power, disk)


def _anew(random: Random, at_s: float, calm_s: float, devices: int) -> Anew:
    return Anew(at_s, _while(random), random.randrange(2**31))


def _leave(random: Random, at_s: float, calm_s: float, devices: int) -> Leave:
    return Leave(at_s, random.randrange(devices), random.uniform(10.0, calm_s))


def _broker_crash(random: Random, at_s: float, calm_s: float, devices: int) -> BrokerCrash:
    return BrokerCrash(at_s, _while(random), persistent=random.random() < 0.5)


def _fail(random: Random, at_s: float, calm_s: float, devices: int) -> Fail:
    party = _party(random, devices)
    kinds = ("killed", "RuntimeError") if party == SERVER else (*END_KINDS, "OutOfMemory", "Diverged", "DataError", "RuntimeError")
    return Fail(at_s, party, tuple(random.choice(kinds) for _ in range(random.randint(1, 3))))


KINDS: tuple[Callable[[Random, float, float, int], Fault], ...] = (
    *(2 * (_weather, _weather, _cut, _stall, _kill, _kill, _leave, _broker_crash, _fail)), _anew,
)  # fmt: skip


def _party(random: Random, devices: int) -> int:
    """The server as often as all devices together would be too often, and as often as one of five too rarely."""
    return SERVER if random.random() < 0.35 else random.randrange(devices)


def _while(random: Random) -> float:
    """Mostly short, sometimes for rounds."""
    return random.choice((random.uniform(0.0, 3.0), random.uniform(3.0, 30.0), random.uniform(30.0, 300.0)))
