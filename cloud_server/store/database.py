"""Transactions on SQLite or PostgreSQL. A connection that is lost is waited for; nothing goes on meanwhile.

A transaction is a function of a connection, called again when the connection was lost: also when that was after the commit
and only its answer is missing. So it must find out by itself whether it has been done.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from lwfed import disk
from lwfed.errors import ConfigError, DatabaseUnreachable, MissingDependency

T = TypeVar("T")
FORM = "write postgresql://USER@HOST/DATABASE"
DRIVERS = ("postgresql", "postgresql+psycopg")
SECRETS = ("password", "sslpassword")
SILENCE = {  # of libpq: a host that vanished is noticed in half a minute instead of hours
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
SESSION = """
SELECT set_config('tcp_keepalives_idle', '10', false), set_config('tcp_keepalives_interval', '5', false),
    set_config('tcp_keepalives_count', '3', false),
    CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', false) END
"""  # the same on its side, where the lock on the run lives on until then; and a commit is on disk when it returns
LONGEST_PAUSE_S = 5.0
READ_ONLY, LOCKED, IO_ERROR = "25006", "55P03", "58030"  # of PostgreSQL's error codes, appendix A of its manual
PASSING = ("40", "53", "57")  # their classes: transaction rollback, insufficient resources, operator intervention


class Database:
    """`path` is SQLite's file; None for PostgreSQL."""

    def __init__(self, engine: Engine, name: str, path: Path | None = None, secrets: tuple[str, ...] = ()) -> None:
        self.name = name  # for people
        self.path = path
        self.patient = False  # whether a lost connection is waited for, or raised
        self.waiting = False
        self.tell: Callable[[str | None], None] = lambda reason: None  # why the connection was lost, once; None when there is one again
        self.insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[engine.dialect.name]
        self._engine = engine
        self._secrets = secrets

    def transact(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, committed. Raises StateError, and DatabaseUnreachable when that is not waited for."""
        try:
            return self._once(work)
        except DatabaseUnreachable as error:
            if not self.patient:
                raise
            return self._wait(work, str(error))

    def close(self) -> None:
        self._engine.dispose()

    def _wait(self, work: Callable[[Connection], T], reason: str) -> T:
        self.waiting = True
        pause = 0.0
        try:
            self.tell(reason)
            while True:
                time.sleep(pause)
                pause = min(LONGEST_PAUSE_S, 2 * pause + 0.1)
                try:
                    found = self._once(work)
                    break
                except DatabaseUnreachable:
                    continue
        finally:
            self.waiting = False
        self.tell(None)
        return found

    def _once(self, work: Callable[[Connection], T]) -> T:
        connected = False
        try:
            with self._engine.begin() as connection:
                connected = True
                return work(connection)
        except SQLAlchemyError as error:
            reason = self._shown(error)
            lost = isinstance(error, DBAPIError) and error.connection_invalidated
            if self.path is None and (lost or (isinstance(error, OperationalError) and not connected)):
                raise DatabaseUnreachable(f"{self.name} does not answer: {reason}; check that it runs and lets this user in") from error
            code = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
            if code == READ_ONLY:
                self._engine.dispose()  # a standby, to which a failover has led: the next connection may find another host
            if code in (READ_ONLY, LOCKED, IO_ERROR) or code.startswith(PASSING):
                raise DatabaseUnreachable(f"{self.name} cannot be used now: {reason}; check what its log says") from error
            check = "permissions and the file" if self.path else "and what its log says"
            raise disk.unusable(f"{self.name} cannot be used: {reason}; check free space, {check}", error) from error

    def _shown(self, error: SQLAlchemyError) -> str:
        """The first line of what the database says; the next ones show values."""
        lines = str(getattr(error, "orig", None) or error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        for secret in self._secrets:
            reason = reason.replace(secret, "***")
        return reason


def open_sqlite(path: Path, durable: bool = True) -> Database:
    """`durable=False` survives no power cut, for simulations."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})
    synchronous = "FULL" if durable else "OFF"  # FULL: a commit survives a power cut, which NORMAL does not promise in WAL

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # Python's module would leave reading and DDL out of transactions
        for pragma in ("journal_mode = WAL", f"synchronous = {synchronous}", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return Database(engine, f"the store {path}", path)


def open_postgresql(address: str) -> Database:
    """Raises ConfigError for what is no address of one, and MissingDependency; connects when it is first used.

    There is one connection, so that a lock that belongs to it is held by all transactions.
    """
    url = _parse(address)
    arguments = {name: value for name, value in SILENCE.items() if name not in url.query}
    try:
        engine = create_engine(url, pool_size=1, max_overflow=0, connect_args=arguments)
    except ImportError:
        raise MissingDependency("--database needs psycopg: pip install 'lwfed[postgres]'") from None
    except ArgumentError:
        raise ConfigError(f"--database has an option that cannot be: {FORM}") from None

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: object) -> None:
        connection.execute(SESSION)
        connection.commit()

    given = (url.password, *(url.query.get(name) for name in SECRETS))
    return Database(engine, _named(url), secrets=tuple(text for text in given if isinstance(text, str) and text))


def _parse(address: str) -> URL:
    try:
        url = make_url(address.strip())
    except (ArgumentError, ValueError):
        raise ConfigError(f"--database is not the address of a database: {FORM}") from None
    if url.drivername not in DRIVERS or not url.database:
        raise ConfigError(f"--database takes a database of PostgreSQL, and SQLite is what there is without it: {FORM}")
    return url.set(drivername=DRIVERS[-1])


def _named(url: URL) -> str:
    """Without user and password."""
    host = url.host or url.query.get("host") or "this machine"
    port = url.port or url.query.get("port")
    return f"database {url.database} at {host}" + (f":{port}" if port else "")
