"""What the server knows, in SQLite: it survives a crash at any moment.

Everything that one event causes is written in one transaction, with the coordinator's state that results from it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError

from lwfed.cloud_server import schema
from lwfed.cloud_server.figures import Contributed, StageFigures, contributed, mean_loss, stage_figures
from lwfed.cloud_server.rounds import State
from lwfed.config import RunConfig
from lwfed.errors import StateError
from lwfed.wire.messages import Hello, Offer, Report, Traffic

FILE_NAME = "run.sqlite"


@dataclass(frozen=True)
class Contribution:
    id: str
    stage: int
    round: int
    participant: int
    blob: str
    size: int  # bytes
    report: Report
    traffic: Traffic

    @classmethod
    def of(cls, offer: Offer, traffic: Traffic) -> Contribution:
        blob = offer.manifest.blob
        return cls(offer.contribution, offer.stage, offer.round, offer.participant, blob.id, blob.size, offer.report, traffic)


@dataclass(frozen=True)
class Device:
    participant: int
    id: str
    hello: Hello
    seen_s: float
    doubled_s: float | None  # when two agents last spoke with its identity


@dataclass(frozen=True)
class Scores:
    knn: float  # accuracy
    probe: float | None
    metrics: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)  # of kNN and probe: `lwfed.models.evaluation.metrics`

    @classmethod
    def of(cls, knn: Mapping[str, float], probe: Mapping[str, float] | None) -> Scores:
        return cls(knn["accuracy"], probe["accuracy"] if probe else None, {"knn": knn, "probe": probe})


@dataclass(frozen=True)
class Judgement:
    """Of the features of a trained stage."""

    collapsed: bool
    spread: float  # of normalised features, per dimension; 1: in all directions alike
    rank: float  # effective rank


class Store:
    """One run. `clock` gives Unix time; `durable=False` survives no power cut, for simulations."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time, durable: bool = True) -> None:
        """Open or create the store below `root`. Raises StateError when it is unusable or of another version."""
        self._path = root / FILE_NAME
        self._clock = clock
        self._engine = _engine(self._path, durable)
        self._run = ""
        with self._transaction() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version == 0:
                schema.metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {schema.VERSION}")
            elif version != schema.VERSION:
                self._engine.dispose()
                raise StateError(
                    f"{self._path} is of schema version {version}, and this cloud-server needs {schema.VERSION}: "
                    "finish the run with the version that began it, or use another --state"
                )
            self._run = connection.execute(select(schema.runs.c.name)).scalar() or ""

    def close(self) -> None:
        self._engine.dispose()

    # Runs

    @property
    def config(self) -> RunConfig | None:
        """The configuration of the run that is stored here; None for a new store."""
        with self._transaction() as connection:
            data = connection.execute(select(schema.runs.c.config)).scalar()
        return None if data is None else RunConfig.from_bytes(data)

    def begin(self, config: RunConfig) -> tuple[State, int, bool]:
        """(state, epoch, resumed): a new run, or the stored one as it was left, from now on under `config`.

        The epoch is later than that of any earlier start, also of another store: devices ignore what is older than they know.
        """
        resumed = self.config is not None
        with self._transaction() as connection:
            if not resumed:
                self._run = config.run.name
                row = {"name": self._run, "config": config.to_bytes(), "started_s": self._clock(), "epoch": 0, "state": State().to_json()}
                connection.execute(schema.runs.insert(), row)
            later = func.max(schema.runs.c.epoch + 1, int(self._clock()))  # clocks are set back at times
            values = {"epoch": later, "config": config.to_bytes()}
            epoch = connection.execute(schema.runs.update().values(values).returning(schema.runs.c.epoch)).scalar_one()
            return self._state(connection), epoch, resumed

    @property
    def state(self) -> State:
        with self._transaction() as connection:
            return self._state(connection)

    @property
    def times(self) -> tuple[float, float | None]:
        """When the run was started, and when it was over if it is; Unix times."""
        with self._transaction() as connection:
            row = connection.execute(select(schema.runs.c.started_s, schema.runs.c.finished_s)).one()
            return row.started_s, row.finished_s

    @contextmanager
    def step(self, state: State) -> Iterator[Step]:
        """One transaction: what is written to the Step, and the coordinator's `state` that follows from it."""
        with self._transaction() as connection:
            yield Step(connection, self._run, self._clock())
            values: dict[str, Any] = {"state": state.to_json()}
            if state.over:
                values["finished_s"] = func.coalesce(schema.runs.c.finished_s, self._clock())
            connection.execute(schema.runs.update().values(**values))

    # Devices

    def admit(self, device: str, hello: Hello) -> tuple[int, bool]:
        """(participant number, whether it is new): numbers are given in order of admission and kept for ever."""
        table = schema.devices
        with self._transaction() as connection:
            known = connection.execute(select(table.c.participant).where(table.c.device == device)).scalar()
            number = connection.execute(select(func.count()).select_from(table)).scalar_one() if known is None else known
            seen = {"hello": hello.model_dump(mode="json"), "seen_s": self._clock()}
            statement = insert(table).values(run=self._run, participant=number, device=device, **seen)
            connection.execute(statement.on_conflict_do_update(index_elements=["run", "participant"], set_=seen))
            return number, known is None

    def devices(self) -> list[Device]:
        with self._transaction() as connection:
            rows = connection.execute(select(schema.devices).order_by(schema.devices.c.participant))
            return [Device(row.participant, row.device, Hello.model_validate(row.hello), row.seen_s, row.doubled_s) for row in rows]

    def note_double(self, participant: int) -> None:
        """Two agents speak with the identity of this device."""
        table = schema.devices
        with self._transaction() as connection:
            connection.execute(table.update().where(table.c.participant == participant).values(doubled_s=self._clock()))

    # What happened

    def has_contribution(self, id: str) -> bool:
        with self._transaction() as connection:
            return connection.execute(select(schema.contributions.c.id).where(schema.contributions.c.id == id)).scalar() is not None

    def contributions(self, stage: int | None = None, round: int | None = None) -> list[Contribution]:
        """In order of stage, round and participant."""
        table = schema.contributions
        wanted = select(table).order_by(table.c.stage, table.c.round, table.c.participant)
        if stage is not None:
            wanted = wanted.where(table.c.stage == stage)
        if round is not None:
            wanted = wanted.where(table.c.round == round)
        with self._transaction() as connection:
            return [_contribution(row) for row in connection.execute(wanted)]

    def scores(self) -> dict[tuple[int, str], Scores]:
        """(stage, name) -> accuracy."""
        table = schema.evaluations
        with self._transaction() as connection:
            rows = connection.execute(select(table).order_by(table.c.stage, table.c.name))
            return {(row.stage, row.name): Scores(row.knn, row.probe, row.metrics) for row in rows}

    def judgements(self) -> dict[tuple[int, int], Judgement]:
        """(stage, attempt) -> what its features are like."""
        table = schema.judgements
        with self._transaction() as connection:
            rows = connection.execute(select(table).order_by(table.c.stage, table.c.attempt))
            return {(row.stage, row.attempt): Judgement(row.collapsed, row.spread, row.rank) for row in rows}

    def loss(self, stage: int, round: int) -> float | None:
        with self._transaction() as connection:
            return mean_loss(connection, stage, round)

    def contributed(self) -> dict[tuple[int, int], Contributed]:
        """(stage, round) -> by how many devices, and the seconds that they computed, added up."""
        with self._transaction() as connection:
            return contributed(connection)

    def figures(self, stage: int) -> StageFigures | None:
        with self._transaction() as connection:
            return stage_figures(connection, stage)

    def stage_began_s(self, stage: int) -> float | None:
        with self._transaction() as connection:
            return connection.execute(select(func.min(schema.rounds.c.begun_s)).where(schema.rounds.c.stage == stage)).scalar()

    def rounds(self) -> list[Any]:
        """Rows of `schema.rounds`, in order."""
        with self._transaction() as connection:
            return list(connection.execute(select(schema.rounds).order_by(schema.rounds.c.stage, schema.rounds.c.round)))

    def checkpoints(self) -> dict[tuple[int, int], dict[str, str]]:
        """(stage, round) -> part -> blob, in order."""
        table = schema.checkpoints
        with self._transaction() as connection:
            return {(row.stage, row.round): row.parts for row in connection.execute(select(table).order_by(table.c.stage, table.c.round))}

    def _state(self, connection: Connection) -> State:
        return State.from_json(connection.execute(select(schema.runs.c.state)).scalar_one())

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            reason = getattr(error, "orig", None) or error
            raise StateError(f"the store {self._path} cannot be used: {reason}; check free space, permissions and the file") from error


class Step:
    """What may be written together with a new state."""

    def __init__(self, connection: Connection, run: str, now: float) -> None:
        self._connection = connection
        self._run = run
        self._now = now

    def begin_round(self, stage: int, round: int, chosen: tuple[int, ...]) -> None:
        """Also for devices chosen later: the round keeps its beginning."""
        row = {"run": self._run, "stage": stage, "round": round, "chosen": list(chosen), "begun_s": self._now}
        statement = insert(schema.rounds).values(**row)
        self._connection.execute(statement.on_conflict_do_update(index_elements=["run", "stage", "round"], set_={"chosen": row["chosen"]}))

    def contribute(self, contribution: Contribution) -> None:
        row = {
            "id": contribution.id,
            "run": self._run,
            "stage": contribution.stage,
            "round": contribution.round,
            "participant": contribution.participant,
            "blob": contribution.blob,
            "bytes": contribution.size,
            "images": contribution.report.images,
            "loss": contribution.report.losses[-1],
            "peak_mb": contribution.report.memory.peak_mb,
            "baseline_mb": contribution.report.memory.baseline_mb,
            "report": contribution.report.model_dump(mode="json"),
            "down_bytes": contribution.traffic.down,
            "up_bytes": contribution.traffic.up,
            "seconds": contribution.report.seconds,
            "received_s": self._now,
        }
        self._connection.execute(schema.contributions.insert(), row)

    def close_round(self, stage: int, round: int) -> None:
        self._update_round(stage, round, closed_s=self._now)

    def calibrated(self, stage: int, round: int, loss: float, seconds: float) -> None:
        self._update_round(stage, round, calibration_loss=loss, calibration_seconds=seconds)

    def evaluated(self, stage: int, name: str, scores: Scores) -> None:
        values = asdict(scores)
        statement = insert(schema.evaluations).values(run=self._run, stage=stage, name=name, **values)
        self._connection.execute(statement.on_conflict_do_update(index_elements=["run", "stage", "name"], set_=values))

    def judged(self, stage: int, attempt: int, judgement: Judgement) -> None:
        self._connection.execute(schema.judgements.insert(), {"run": self._run, "stage": stage, "attempt": attempt, **asdict(judgement)})

    def checkpoint(self, stage: int, round: int, parts: dict[str, str]) -> None:
        """Replaces the one of the stage's previous round."""
        self.forget_checkpoint(stage)
        self._connection.execute(schema.checkpoints.insert(), {"run": self._run, "stage": stage, "round": round, "parts": parts})

    def forget_checkpoint(self, stage: int) -> None:
        table = schema.checkpoints
        self._connection.execute(table.delete().where(table.c.stage == stage))

    def _update_round(self, stage: int, round: int, **values: float) -> None:
        table = schema.rounds
        self._connection.execute(table.update().where(table.c.stage == stage, table.c.round == round).values(**values))


def _engine(path: Path, durable: bool) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, record: object) -> None:
        cursor = connection.cursor()
        synchronous = "FULL" if durable else "OFF"  # FULL: a commit survives a power cut, which NORMAL does not promise in WAL
        for pragma in ("journal_mode = WAL", f"synchronous = {synchronous}", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


def _contribution(row: Any) -> Contribution:
    traffic = Traffic(down=row.down_bytes, up=row.up_bytes)
    report = Report.model_validate(row.report)
    return Contribution(row.id, row.stage, row.round, row.participant, row.blob, row.bytes, report, traffic)
