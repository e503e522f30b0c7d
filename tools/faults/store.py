"""The server's store in memory: its tables survive the process that wrote them, by whole steps.

In a database a schedule would spend most of its time. `tests/cloud_server/test_store.py` asks the same of this store as of
SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Engine, create_engine

from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.store import Begun, Contributed, Contribution, Device, Judgement, Scores, StageFigures, Step, Store
from lwfed.cloud_server.store.database import Database
from lwfed.cloud_server.store.figures import figures_of
from lwfed.cloud_server.store.store import SEEN_EVERY_S
from lwfed.config import RunConfig
from lwfed.errors import StateError
from lwfed.wire.messages import Hello

Place = tuple[int, int]  # stage and round, or stage and attempt


@dataclass(frozen=True)
class Round:
    stage: int
    round: int
    chosen: list[int]
    begun_s: float
    closed_s: float | None = None
    calibration_loss: float | None = None
    calibration_seconds: float | None = None
    left_out: list[int] = field(default_factory=list)


@dataclass
class Tables:
    """Of one run. Rows are replaced, never changed, so that a copy costs little."""

    run: str = ""
    config: RunConfig | None = None
    state: State = field(default_factory=State)
    epoch: int = 0
    times: tuple[float, float | None] = (0.0, None)
    devices: dict[str, Device] = field(default_factory=dict)
    rounds: dict[Place, Round] = field(default_factory=dict)
    contributions: dict[str, Contribution] = field(default_factory=dict)
    scores: dict[tuple[int, str], Scores] = field(default_factory=dict)
    judgements: dict[Place, Judgement] = field(default_factory=dict)
    checkpoints: dict[Place, dict[str, str]] = field(default_factory=dict)

    def copy(self) -> Tables:
        copied: dict[str, Any] = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(self).items()}
        return Tables(**copied)


@dataclass
class Kept:
    """What is written; it outlives the stores that are opened on it."""

    number: int = 0  # of the run among those of its name
    tables: Tables = field(default_factory=Tables)


class MemoryStep(Step):
    """Changes `tables`, a copy that counts when the step is over."""

    def __init__(self, tables: Tables, now: float) -> None:
        self._tables, self._now = tables, now

    def begin_round(self, stage: int, round: int, chosen: tuple[int, ...]) -> None:
        known = self._tables.rounds.get((stage, round)) or Round(stage, round, [], self._now)
        self._tables.rounds[stage, round] = replace(known, chosen=list(chosen))

    def contribute(self, contribution: Contribution) -> None:
        known, place = self._tables.contributions, (contribution.stage, contribution.round)
        if contribution.id in known or (*place, contribution.participant) in map(_place, known.values()):
            raise StateError("UNIQUE constraint failed: contributions")
        if place not in self._tables.rounds or contribution.participant >= len(self._tables.devices):
            raise StateError("FOREIGN KEY constraint failed: contributions")
        known[contribution.id] = contribution

    def evaluated(self, stage: int, name: str, scores: Scores) -> None:
        self._tables.scores[stage, name] = scores

    def judged(self, stage: int, attempt: int, judgement: Judgement) -> None:
        if (stage, attempt) in self._tables.judgements:
            raise StateError("UNIQUE constraint failed: judgements")
        self._tables.judgements[stage, attempt] = judgement

    def checkpoint(self, stage: int, round: int, parts: dict[str, str]) -> None:
        self.forget_checkpoint(stage)
        self._tables.checkpoints[stage, round] = dict(parts)

    def forget_checkpoint(self, stage: int) -> None:
        self._tables.checkpoints = {place: parts for place, parts in self._tables.checkpoints.items() if place[0] != stage}

    def _update_round(self, stage: int, round: int, **values: Any) -> None:
        self._tables.rounds[stage, round] = replace(self._tables.rounds[stage, round], **values)


class MemoryStore(Store):
    """The run in `kept`, which there need not be yet. `clock` gives Unix time, and is asked before anything is written."""

    def __init__(self, kept: Kept, run: str, clock: Callable[[], float]) -> None:
        super().__init__(Database(_engine(), "the store in memory", Path()), kept.tables.run or run, clock)
        self._kept = kept

    def close(self) -> None:
        pass

    # Runs

    @property
    def config(self) -> RunConfig | None:
        return self._tables.config

    def begin(self, config: RunConfig, least_epoch: int = 0) -> Begun:
        now = self._clock()
        tables, known = self._tables.copy(), self._tables.config is not None
        if not known:
            tables.run, tables.times = self.run, (now, None)
        tables.config, tables.epoch = config, max(tables.epoch + 1, int(now), least_epoch)
        self._kept.tables = tables
        return Begun(self.id, self.state, tables.epoch, known)

    @property
    def id(self) -> str:
        return f"{self.run}-{self._kept.number:08x}"

    @property
    def state(self) -> State:
        return State.from_json(self._tables.state.to_json())  # as a start finds it in a database

    @property
    def times(self) -> tuple[float, float | None]:
        return self._tables.times

    @contextmanager
    def step(self, state: State) -> Iterator[Step]:
        now, tables = self._clock(), self._tables.copy()
        yield MemoryStep(tables, now)
        tables.state = state
        started_s, finished_s = tables.times
        if state.over and finished_s is None:
            tables.times = started_s, now
        self._kept.tables = tables

    # Devices

    def admit(self, device: str, hello: Hello) -> tuple[int, bool]:
        now, tables = self._clock(), self._tables.copy()
        known = tables.devices.get(device)
        if known is None:
            tables.devices[device] = Device(len(tables.devices), device, hello, now, None, {})
        elif known.hello != hello or not 0 <= now - known.seen_s < SEEN_EVERY_S:
            tables.devices[device] = replace(known, hello=hello, seen_s=now)
        self._kept.tables = tables
        return tables.devices[device].participant, known is None

    def devices(self) -> list[Device]:
        return list(self._tables.devices.values())

    def note_double(self, participant: int) -> None:
        now, tables = self._clock(), self._tables.copy()
        device = self.devices()[participant]
        tables.devices[device.id] = replace(device, doubled_s=now)
        self._kept.tables = tables

    def note_complaints(self, totals: Mapping[str, Mapping[str, int]]) -> None:
        self._clock()
        tables = self._tables.copy()
        for device, codes in totals.items():
            tables.devices[device] = replace(tables.devices[device], complaints=dict(codes))
        self._kept.tables = tables

    # What happened

    def has_contribution(self, id: str) -> bool:
        return id in self._tables.contributions

    def contributions(self, stage: int | None = None, round: int | None = None) -> list[Contribution]:
        found = self._tables.contributions.values()
        return sorted((one for one in found if stage in (None, one.stage) and round in (None, one.round)), key=_place)

    def scores(self) -> dict[tuple[int, str], Scores]:
        return dict(sorted(self._tables.scores.items()))

    def judgements(self) -> dict[Place, Judgement]:
        return dict(sorted(self._tables.judgements.items()))

    def loss(self, stage: int, round: int) -> float | None:
        reports = [one.report for one in self.contributions(stage, round)]
        images = sum(report.images for report in reports)
        return sum(report.images * report.losses[-1] for report in reports) / images if images else None

    def contributed(self) -> dict[Place, Contributed]:
        found = self.contributions()
        grouped = {(one.stage, one.round): [other for other in found if _place(other)[:2] == (one.stage, one.round)] for one in found}
        return {place: Contributed(len(ones), sum(one.report.seconds for one in ones)) for place, ones in grouped.items()}

    def figures(self, stage: int) -> StageFigures | None:
        found = [one for one in self.contributions() if one.stage <= stage]
        grouped: dict[tuple[int, bool], list[Contribution]] = {}
        for one in found:
            grouped.setdefault((one.participant, one.stage == stage), []).append(one)
        rows = [
            SimpleNamespace(
                participant=participant,
                ours=ours,
                peak=max(one.report.memory.peak_mb for one in ones),
                baseline=max(one.report.memory.baseline_mb for one in ones),
                down_bytes=ones[-1].traffic.down,
                up_bytes=ones[-1].traffic.up,
            )
            for (participant, ours), ones in grouped.items()
        ]
        return figures_of(rows, len({one.participant for one in self._tables.contributions.values()}))

    def stage_began_s(self, stage: int) -> float | None:
        return min((row.begun_s for row in self._tables.rounds.values() if row.stage == stage), default=None)

    def rounds(self) -> list[Any]:
        return [row for _, row in sorted(self._tables.rounds.items())]

    def checkpoints(self) -> dict[Place, dict[str, str]]:
        return {place: dict(parts) for place, parts in sorted(self._tables.checkpoints.items())}

    @property
    def _tables(self) -> Tables:
        return self._kept.tables


def _place(one: Contribution) -> tuple[int, int, int]:
    return one.stage, one.round, one.participant


@cache
def _engine() -> Engine:
    """That nobody connects."""
    return create_engine("sqlite://")
