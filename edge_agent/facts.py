"""Where a journal keeps its facts, each a text under a key: in one small SQLite file, or in memory for simulations."""

from __future__ import annotations

import contextlib
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from lwfed import disk
from lwfed.errors import StateError
from lwfed.sqlite import transaction

SCHEMA = 1


class Facts(ABC):
    place: str  # for people

    @abstractmethod
    def transaction(self) -> AbstractContextManager[None]:
        """What is written within happened entirely or not at all."""

    @abstractmethod
    def get(self, key: str) -> str | None: ...

    @abstractmethod
    def put(self, key: str, value: str) -> None:
        """Within a transaction, as `drop`."""

    @abstractmethod
    def drop(self, key: str) -> None: ...

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def close(self) -> None: ...


class SqliteFacts(Facts):
    """Raises StateError when the file is unusable."""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        with self._explained():
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise StateError(f"{path} was written by a newer edge-agent: upgrade this one, or use another --state")
        with self.transaction():
            self._db.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
            self._db.execute(f"PRAGMA user_version={SCHEMA}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self._explained(), transaction(self._db):
            yield

    def get(self, key: str) -> str | None:
        with self._explained():
            row = self._db.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def drop(self, key: str) -> None:
        self._db.execute("DELETE FROM facts WHERE key = ?", (key,))

    def names(self) -> list[str]:
        with self._explained():
            return [str(key) for (key,) in self._db.execute("SELECT key FROM facts")]

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if not isinstance(error, sqlite3.OperationalError):
                advice = "move the file away to start over as a new device"
            elif "is full" in str(error):
                advice = "free space on its disk: nothing is lost"
            else:
                advice = "check that its folder may be written and that its disk works, then start again"
            raise disk.unusable(f"the agent's journal {self.place} is unusable ({error}): {advice}", error) from None


class MemoryFacts(Facts):
    """Survives nothing by itself: `held` is for the caller to keep."""

    place = "the journal in memory"

    def __init__(self, held: Mapping[str, str]) -> None:
        self.held = dict(held)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        before = dict(self.held)
        try:
            yield
        except BaseException:
            self.held = before
            raise

    def get(self, key: str) -> str | None:
        return self.held.get(key)

    def put(self, key: str, value: str) -> None:
        self.held[key] = value

    def drop(self, key: str) -> None:
        self.held.pop(key, None)

    def names(self) -> list[str]:
        return list(self.held)

    def close(self) -> None:
        pass
