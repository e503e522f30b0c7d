"""Transactions of small SQLite files."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """What is written within happens entirely or not at all. `database` is opened with ``isolation_level=None``."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # SQLite has ended it by itself where the disk is full
            database.execute("ROLLBACK")
        raise
