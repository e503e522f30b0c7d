"""What a device remembers across a power cut, in one small SQLite file.

Every method is one transaction: it happened entirely or not at all.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from lwfed.errors import StateError
from lwfed.wire.messages import BlobRef, Count, Execution, Name, Record, Report, Task, Traffic

SCHEMA = 1
Stored = TypeVar("Stored", bound=BaseModel)


class Update(Record):
    """A finished update that the server has not acknowledged; its tensors are blob `blob` of the spool."""

    task: Task
    blob: BlobRef
    chunk_bytes: int
    report: Report


class Accepted(Record):
    """The last task whose update a server took, and in which of its starts."""

    task: Task
    epoch: Count


class Seen(Record):
    """The newest announcement that was obeyed."""

    epoch: Count
    seq: Count

    def __lt__(self, other: Seen) -> bool:
        return (self.epoch, self.seq) < (other.epoch, other.seq)


class Identity(Record):
    device: Name
    boot: Count  # starts of the agent


class Journal:
    """Opening it counts as a start of the agent. Raises StateError when the file is unusable."""

    def __init__(self, path: Path, name: str = "device") -> None:
        self._path = path
        with self._explained():
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise StateError(f"{path} was written by a newer edge-agent: upgrade this one, or use another --state")
        with self._transaction():
            self._db.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
            self._db.execute(f"PRAGMA user_version={SCHEMA}")
            before = self._read("device", Identity) or Identity(device=_new_id(name), boot=0)
            self.device, self.boot = before.device, before.boot + 1
            self._put("device", Identity(device=self.device, boot=self.boot).model_dump_json())

    def close(self) -> None:
        self._db.close()

    # The work of the present round

    @property
    def task(self) -> Task | None:
        """The task in progress, which a restart interrupts."""
        return self._read("task", Task)

    def begin(self, task: Task) -> None:
        with self._transaction():
            self._put("task", task.model_dump_json())

    def abandon(self) -> None:
        with self._transaction():
            self._drop("task")

    @property
    def update(self) -> Update | None:
        return self._read("update", Update)

    def finish(self, update: Update) -> None:
        """The task is done; what it made is kept until `settle`."""
        with self._transaction():
            self._drop("task")
            self._put("update", update.model_dump_json())

    def settle(self, accepted: Accepted | None = None) -> None:
        """The server has the update, or does not want it."""
        with self._transaction():
            self._drop("update")
            if accepted is not None:
                self._put("accepted", accepted.model_dump_json())

    @property
    def accepted(self) -> Accepted | None:
        return self._read("accepted", Accepted)

    def execution(self, run: str, stage: int) -> Execution | None:
        """How this device computes in the stage, fixed before its first step there."""
        return self._read(f"execution {run} {stage}", Execution)

    def fix_execution(self, run: str, stage: int, execution: Execution) -> None:
        with self._transaction():
            self._put(f"execution {run} {stage}", execution.model_dump_json())

    # The connection

    @property
    def seen(self) -> Seen:
        return self._read("seen", Seen) or Seen(epoch=0, seq=0)

    def saw(self, seen: Seen) -> None:
        with self._transaction():
            self._put("seen", seen.model_dump_json())

    def traffic(self, run: str) -> Traffic:
        return self._read(f"traffic {run}", Traffic) or Traffic(down=0, up=0)

    def count(self, run: str, traffic: Traffic) -> None:
        with self._transaction():
            self._put(f"traffic {run}", traffic.model_dump_json())

    def keep_run(self, run: str) -> None:
        """Forget what is known of other runs."""
        with self._transaction():
            mine = (f"traffic {run}", f"execution {run} %")
            self._db.execute("DELETE FROM facts WHERE key LIKE '% %' AND key != ? AND key NOT LIKE ?", mine)

    def _read(self, key: str, model: type[Stored]) -> Stored | None:
        text = self._get(key)
        try:
            return None if text is None else model.model_validate_json(text)
        except ValidationError:
            raise StateError(f"{self._path}: {key} does not parse; move the file away to start over as a new device") from None

    def _get(self, key: str) -> str | None:
        with self._explained():
            row = self._db.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _put(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def _drop(self, key: str) -> None:
        self._db.execute("DELETE FROM facts WHERE key = ?", (key,))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:  # SQLite has ended it by itself where the disk is full
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if not isinstance(error, sqlite3.OperationalError):
                advice = "move the file away to start over as a new device"
            elif "is full" in str(error):
                advice = "free space on its disk and start again: nothing is lost"
            else:
                advice = "check that its folder may be written and that its disk works, then start again"
            raise StateError(f"the agent's journal {self._path} is unusable ({error}): {advice}") from None


def _new_id(name: str) -> str:
    """Random, so that it says nothing about the device; beginning with the agent's name, so that people can tell them apart."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "device"
    return f"{readable}-{secrets.token_hex(4)}"
