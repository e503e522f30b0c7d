"""What the server knows of a run: it survives a crash at any moment.

Everything that one event causes is written in one transaction, with the coordinator's state that results from it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Column, Connection, Executable, Row, Select, Table, func, select

from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.store import exclusion, figures, schema
from lwfed.cloud_server.store.database import Database
from lwfed.cloud_server.store.figures import Contributed, StageFigures
from lwfed.cloud_server.store.records import Contribution, Device, Judgement, Scores
from lwfed.cloud_server.store.step import Step
from lwfed.config import RunConfig
from lwfed.errors import DatabaseUnreachable, StateError
from lwfed.locks import in_use
from lwfed.wire.messages import Hello
from lwfed.wire.records import MAX_NAME

T = TypeVar("T")
HANDOVER_S = 30.0  # PostgreSQL notices within 25 s that a machine is gone (`database.SESSION`)
RETRY_S = 0.05
SEEN_EVERY_S = 60.0


class Begun(NamedTuple):
    id: str  # by which devices know the run
    state: State
    epoch: int
    resumed: bool


class Store:
    """The run called `run`, which there need not be yet. `clock` gives Unix time."""

    def __init__(self, database: Database, run: str, clock: Callable[[], float] = time.time) -> None:
        self.run = run
        self.database = database
        self._clock = clock
        self._epoch: int | None = None  # of this server, which has the run for itself; None: whoever else reads
        self._steps = 0

    def close(self) -> None:
        self.database.close()

    # Runs

    @property
    def config(self) -> RunConfig | None:
        """The configuration of the run; None while it has not begun."""
        data = self._transact(lambda connection: connection.execute(self._of_run(schema.runs.c.config)).scalar())
        return None if data is None else RunConfig.from_bytes(data)

    def begin(self, config: RunConfig, least_epoch: int = 0) -> Begun:
        """A new run, or the stored one as it was left, from now on under `config`. Raises StateError when another server has it.

        The epoch is later than that of any earlier start, and `least_epoch` at least: devices ignore what is older than they know.
        Of another store only the clock says which was, and clocks are set back at times. From now on a lost connection is waited for.
        """
        until = time.monotonic() + HANDOVER_S
        while not self.database.transact(lambda connection: exclusion.hold(connection, self.run)):
            if time.monotonic() >= until:
                raise StateError(f"{self.database.name}: another cloud-server serves run {self.run!r}; end it, or use --set run.name=NAME")
            time.sleep(RETRY_S)
        begun, self._steps = self.database.transact(lambda connection: self._begin(connection, config, least_epoch))
        self._epoch = begun.epoch
        self.database.patient = True
        return begun

    def _begin(self, connection: Connection, config: RunConfig, least_epoch: int) -> tuple[Begun, int]:
        table, now = schema.runs, self._clock()
        epoch = max(int(now), least_epoch)
        known = connection.execute(self._of_run(table)).one_or_none()
        if known is None:
            begun = Begun(new_id(self.run), State(), epoch, resumed=False)
            row = {"name": self.run, "id": begun.id, "epoch": begun.epoch, "state": begun.state.to_json()}
            connection.execute(table.insert(), {**row, "config": config.to_bytes(), "started_s": now})
            return begun, 0
        epoch = max(known.epoch + 1, epoch)
        connection.execute(table.update().where(table.c.name == self.run).values(epoch=epoch, config=config.to_bytes()))
        return Begun(known.id, State.from_json(known.state), epoch, resumed=True), known.steps

    @property
    def id(self) -> str:
        """By which devices know the run."""
        return str(self._transact(lambda connection: connection.execute(self._of_run(schema.runs.c.id)).scalar_one()))

    @property
    def state(self) -> State:
        return State.from_json(self._transact(lambda connection: connection.execute(self._of_run(schema.runs.c.state)).scalar_one()))

    @property
    def times(self) -> tuple[float, float | None]:
        """When the run was started, and when it was over if it is; Unix times."""
        row = self._rows(self._of_run(schema.runs.c.started_s, schema.runs.c.finished_s))[0]
        return row.started_s, row.finished_s

    @property
    def served(self) -> bool:
        """Whether a server is at work on the run."""
        if self.database.path is not None:
            return in_use(self.database.path.parent)
        return self._transact(lambda connection: exclusion.is_held(connection, self.run))

    @contextmanager
    def step(self, state: State) -> Iterator[Step]:
        """One transaction: what is written to the Step, and the coordinator's `state` that follows from it."""
        now = self._clock()
        step = Step(self.database.insert, self.run, now)
        yield step
        values: dict[str, Any] = {"state": state.to_json(), "steps": self._steps + 1}
        if state.over:
            values["finished_s"] = func.coalesce(schema.runs.c.finished_s, now)
        self._transact(lambda connection: self._write(connection, values, step.statements))
        self._steps += 1

    def _write(self, connection: Connection, values: dict[str, Any], statements: list[Executable]) -> None:
        """Unless it has been written: the answer to a commit may be lost with the connection."""
        table = schema.runs
        due = table.c.name == self.run, table.c.epoch == self._epoch, table.c.steps == self._steps
        if connection.execute(table.update().where(*due).values(**values).returning(table.c.steps)).scalar() is not None:
            for statement in statements:
                connection.execute(statement)
            return
        self._check_epoch(connection)
        if connection.execute(self._of_run(table.c.steps)).scalar_one() != self._steps + 1:
            raise StateError(f"{self.database.name}: run {self.run!r} was put back to an earlier state; start this server again")

    # Devices

    def admit(self, device: str, hello: Hello) -> tuple[int, bool]:
        """(participant number, whether it is new): numbers are given in order of admission and kept for ever.

        A greeting that says nothing new is written once in `SEEN_EVERY_S`.
        """
        table, seen = schema.devices, {"hello": hello.model_dump(mode="json"), "seen_s": self._clock()}

        def work(connection: Connection) -> tuple[int, bool]:
            known = connection.execute(self._of(table).where(table.c.device == device)).one_or_none()
            if known is not None and known.hello == seen["hello"] and 0 <= seen["seen_s"] - known.seen_s < SEEN_EVERY_S:
                return known.participant, False
            number = connection.execute(self._of(table, func.count())).scalar_one() if known is None else known.participant
            statement = self.database.insert(table).values(run=self.run, participant=number, device=device, **seen)
            connection.execute(statement.on_conflict_do_update(index_elements=["run", "participant"], set_=seen))
            return number, known is None

        return self._transact(work)

    def devices(self) -> list[Device]:
        rows = self._rows(self._of(schema.devices).order_by(schema.devices.c.participant))
        return [
            Device(row.participant, row.device, Hello.model_validate(row.hello), row.seen_s, row.doubled_s, row.complaints) for row in rows
        ]

    def note_double(self, participant: int) -> None:
        """Two agents speak with the identity of this device."""
        table = schema.devices
        place = table.c.run == self.run, table.c.participant == participant
        statement = table.update().where(*place).values(doubled_s=self._clock())
        self._transact(lambda connection: connection.execute(statement))

    def note_complaints(self, totals: Mapping[str, Mapping[str, int]]) -> None:
        """Device -> code -> how often, over the run."""
        table = schema.devices
        updates = [
            table.update().where(table.c.run == self.run, table.c.device == device).values(complaints=dict(codes))
            for device, codes in totals.items()
        ]
        self._transact(lambda connection: [connection.execute(update) for update in updates])

    # What happened

    def has_contribution(self, id: str) -> bool:
        table = schema.contributions
        return bool(self._rows(self._of(table, table.c.id).where(table.c.id == id)))

    def contributions(self, stage: int | None = None, round: int | None = None) -> list[Contribution]:
        """In order of stage, round and participant."""
        table = schema.contributions
        wanted = self._of(table).order_by(table.c.stage, table.c.round, table.c.participant)
        if stage is not None:
            wanted = wanted.where(table.c.stage == stage)
        if round is not None:
            wanted = wanted.where(table.c.round == round)
        return [Contribution.of_row(row) for row in self._rows(wanted)]

    def scores(self) -> dict[tuple[int, str], Scores]:
        """(stage, name) -> accuracy."""
        table = schema.evaluations
        rows = self._rows(self._of(table).order_by(table.c.stage, table.c.name))
        return {(row.stage, row.name): Scores(row.knn, row.probe, row.metrics) for row in rows}

    def judgements(self) -> dict[tuple[int, int], Judgement]:
        """(stage, attempt) -> what its features are like."""
        table = schema.judgements
        rows = self._rows(self._of(table).order_by(table.c.stage, table.c.attempt))
        return {(row.stage, row.attempt): Judgement(row.collapsed, row.spread, row.rank) for row in rows}

    def loss(self, stage: int, round: int) -> float | None:
        return self._transact(lambda connection: figures.mean_loss(connection, self.run, stage, round))

    def contributed(self) -> dict[tuple[int, int], Contributed]:
        """(stage, round) -> by how many devices, and the seconds that they computed, added up."""
        return self._transact(lambda connection: figures.contributed(connection, self.run))

    def figures(self, stage: int) -> StageFigures | None:
        return self._transact(lambda connection: figures.stage_figures(connection, self.run, stage))

    def stage_began_s(self, stage: int) -> float | None:
        table = schema.rounds
        wanted = self._of(table, func.min(table.c.begun_s)).where(table.c.stage == stage)
        return self._transact(lambda connection: connection.execute(wanted).scalar())

    def rounds(self) -> list[Row[Any]]:
        """Rows of `schema.rounds`, in order."""
        return self._rows(self._of(schema.rounds).order_by(schema.rounds.c.stage, schema.rounds.c.round))

    def checkpoints(self) -> dict[tuple[int, int], dict[str, str]]:
        """(stage, round) -> part -> blob, in order."""
        table = schema.checkpoints
        return {(row.stage, row.round): row.parts for row in self._rows(self._of(table).order_by(table.c.stage, table.c.round))}

    # Of this run, and while it is ours

    def _of_run(self, *columns: Column[Any] | Table) -> Select[Any]:
        return select(*columns).where(schema.runs.c.name == self.run)

    def _of(self, table: Table, *columns: Any) -> Select[Any]:
        return select(*(columns or (table,))).select_from(table).where(table.c.run == self.run)

    def _rows(self, wanted: Select[Any]) -> list[Row[Any]]:
        return self._transact(lambda connection: list(connection.execute(wanted)))

    def _transact(self, work: Callable[[Connection], T]) -> T:
        def ours(connection: Connection) -> T:
            if self._epoch is not None and not exclusion.remembered(connection):
                self._take_up(connection)
            return work(connection)

        return self.database.transact(ours)

    def _take_up(self, connection: Connection) -> None:
        """Go on with a new connection, unless another server did while there was none."""
        held = exclusion.hold(connection, self.run)
        self._check_epoch(connection)
        if not held:
            raise DatabaseUnreachable(f"{self.database.name}: the connection before this one still has run {self.run!r}")
        exclusion.remember(connection)

    def _check_epoch(self, connection: Connection) -> None:
        if connection.execute(self._of_run(schema.runs.c.epoch)).scalar_one() != self._epoch:
            raise StateError(f"{self.database.name}: another cloud-server has taken over run {self.run!r}; this one ends")


def new_id(run: str) -> str:
    """Another one at each call, and of one length for a name: begun again under the same name, a run is another."""
    return f"{run[: MAX_NAME - 9]}-{secrets.token_hex(4)}"
