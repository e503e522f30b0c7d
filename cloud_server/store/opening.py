"""Which store belongs to the folder of a run: ``run.sqlite`` in it, or a database that ``database.json`` names.

The folder holds the blobs of one run. Served for a run of another store it would be tidied up, so the two are held together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import select

from lwfed import disk
from lwfed.cloud_server.store import schema
from lwfed.cloud_server.store.database import Database, open_postgresql, open_sqlite
from lwfed.cloud_server.store.store import Store
from lwfed.cloud_server.store.versions import check, prepare
from lwfed.errors import StateError

FILE_NAME = "run.sqlite"
TIE_NAME = "database.json"


@dataclass(frozen=True)
class Tie:
    """The run that a folder belongs to, and the name of its database."""

    run: str
    database: str

    @classmethod
    def of(cls, root: Path) -> Tie | None:
        """Raises StateError for one that cannot be read."""
        file = root / TIE_NAME
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
        except (OSError, ValueError, TypeError) as error:
            raise StateError(f"{file} cannot be read ({error}): delete it if this is the folder of the run that you serve") from None


def open_store(root: Path, run: str, address: str | None = None, clock: Callable[[], float] = time.time, durable: bool = True) -> Store:
    """The store of the run below `root`, made or migrated where needed, for a server that has locked `root`.

    `address` is that of a PostgreSQL database; `durable=False` survives no power cut, for simulations. Raises StateError when it
    is unusable, of a newer version, or belongs to another folder.
    """
    tie = Tie.of(root)
    if address is None:
        if tie:
            raise StateError(f"run {tie.run!r} in {root} is kept in {tie.database}: give its --database")
        database = open_sqlite(root / FILE_NAME, durable)
    elif (root / FILE_NAME).exists():
        raise StateError(f"the run in {root} is kept in {FILE_NAME} there: leave out --database, or use another --state")
    else:
        database = open_postgresql(address)
    try:
        prepare(database)
        stored = _runs(database)
        if address is None:
            return Store(database, stored[0] if stored else run, clock)
        store = Store(database, tie.run if tie else run, clock)
        _check_folder(root, tie, store, store.run in stored)
        return store
    except BaseException:
        database.close()
        raise


def bind_folder(root: Path, store: Store) -> None:
    """Note in the folder, durably, to which run it belongs from now on. Raises StateError."""
    bond = Tie(store.run, store.database.name)
    if store.database.path is not None or Tie.of(root) == bond:
        return
    temporary = root / f"{TIE_NAME}.new"
    try:
        temporary.write_text(json.dumps(asdict(bond)), encoding="utf-8")
        disk.install(temporary, root / TIE_NAME)
    except OSError as error:
        raise disk.unusable(f"cannot write {error.filename}: {error.strerror or error}; check free space and permissions", error) from None


@contextmanager
def stored_runs(root: Path | None, address: str | None) -> Iterator[list[Store]]:
    """For whoever looks in from outside: the run below `root`, or without it all of the database. Raises StateError for none."""
    tie = Tie.of(root) if root else None
    if address is not None:
        database = open_postgresql(address)
    elif tie:
        raise StateError(f"run {tie.run!r} in {root} is kept in {tie.database}: give its --database")
    elif root is None or not (root / FILE_NAME).is_file():
        raise StateError(f"there is no run in {root}: give the --state that `cloud-server serve` was given")
    else:
        database = open_sqlite(root / FILE_NAME)
    try:
        version = check(database)
        if version not in (None, schema.HEAD):
            raise StateError(f"{database.name} is of version {version}, older than {schema.HEAD}: `cloud-server serve` migrates it")
        stored = _runs(database) if version else []
        if root and address:
            stored = [run for run in stored if tie and run == tie.run]
        if not stored:
            where = f"{database.name} holds no run" + (f" of {root}" if root and address else "")
            raise StateError(f"{where}: begin it with `cloud-server serve`")
        yield [Store(database, run) for run in stored]
    finally:
        database.close()


def _runs(database: Database) -> list[str]:
    names = select(schema.runs.c.name).order_by(schema.runs.c.started_s)
    return database.transact(lambda connection: list(connection.scalars(names)))


def _check_folder(root: Path, tie: Tie | None, store: Store, stored: bool) -> None:
    """Whether the blobs below `root` are those of the run. Raises StateError."""
    name = store.database.name
    if tie and not stored:
        remedy = "give the --database that does, or use another --state"
        raise StateError(f"{root} belongs to run {tie.run!r} of {tie.database}, and {name} does not hold it: {remedy}")
    if stored and not tie and store.state.parts:
        remedy = "give the --state that it was begun with, or begin another run with --set run.name=NAME"
        raise StateError(f"{name} holds run {store.run!r}, whose model is in another folder than {root}: {remedy}")
