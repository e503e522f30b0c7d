"""One server for each run of a database. With SQLite the lock on the state folder sees to that.

The lock is PostgreSQL's, belongs to the connection and ends with it, however that ends. So it is taken anew with every new
connection, and a server that finds a later epoch then has been replaced meanwhile.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

_KEY = "hashtextextended(:run, 'runs'::regclass::oid::bigint)"  # of these tables: there may be others in another schema
_HOLD = text(f"SELECT pg_try_advisory_lock({_KEY})")
_PASS = text(f"SELECT pg_try_advisory_xact_lock_shared({_KEY})")  # those who ask do not see each other
_BLOCK = text(f"SELECT pg_try_advisory_xact_lock({_KEY})")
_CHANGE = text("SELECT pg_advisory_xact_lock(hashtextextended('lwfed', 0))")


def hold(connection: Connection, run: str) -> bool:
    """Whether this connection has the run for itself, from now on until it ends."""
    return connection.dialect.name != "postgresql" or bool(connection.execute(_HOLD, {"run": run}).scalar_one())


def remember(connection: Connection) -> None:
    """That it has the run, and nobody had it since the connection before."""
    connection.info["held"] = True


def remembered(connection: Connection) -> bool:
    return "held" in connection.info


def is_held(connection: Connection, run: str) -> bool:
    """Whether another connection has it."""
    return not connection.execute(_PASS, {"run": run}).scalar_one()


def block(connection: Connection, run: str) -> bool:
    """Keep all servers of `run` away until the transaction ends; False when there is one."""
    return bool(connection.execute(_BLOCK, {"run": run}).scalar_one())


def wait_to_change(connection: Connection) -> None:
    """Until the transaction ends nobody else makes or migrates tables."""
    if connection.dialect.name == "postgresql":
        connection.execute(_CHANGE)
