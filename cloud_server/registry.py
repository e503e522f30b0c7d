"""Which devices are invited, enrolled and revoked: one SQLite file, for the server and for `enrol` and `revoke` beside it.

    invited --certify--> enrolled --confirm: it has come--> joined       invited, enrolled or joined --revoke--> revoked

A name that was revoked is never given away again while this file is kept (for an older copy see docs/SECURITY.md): certificates
of it may still be about. A device that is invited anew before it has joined, because its certificate was lost, gets one of
another subject, so that the broker can tell the two.

The latest epoch of a server is kept here as well: enrolled devices follow none of an earlier start, of whichever run.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwfed import disk
from lwfed.errors import StateError
from lwfed.sqlite import transaction

FILE_NAME = "devices.sqlite"
SCHEMA = 2
SUBJECT = 64  # characters that a certificate has for it
TABLES = (
    """CREATE TABLE IF NOT EXISTS devices (
        name TEXT PRIMARY KEY,
        token TEXT NOT NULL UNIQUE,
        secret TEXT NOT NULL,  -- SHA-256 in hex
        expires_s REAL NOT NULL,  -- Unix time
        request TEXT,  -- that was certified
        certificate TEXT,
        joined_s REAL,
        revoked_s REAL,
        subject TEXT  -- of its certificate, where that is not its name
    ) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS starts (one INTEGER PRIMARY KEY CHECK (one = 1), epoch INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS contact (one INTEGER PRIMARY KEY CHECK (one = 1), host TEXT, port INTEGER, fleet TEXT)",
)


@dataclass(frozen=True)
class Contact:
    """Where devices reach the server."""

    host: str
    port: int
    fleet: str


@dataclass(frozen=True)
class Device:
    name: str
    token: str
    secret: str  # its digest
    expires_s: float
    request: str | None
    certificate: str | None
    joined_s: float | None
    revoked_s: float | None
    subject: str | None

    @property
    def user(self) -> str:
        """As which the broker knows it by its certificate."""
        return self.subject or self.name

    @property
    def admitted(self) -> bool:
        return self.certificate is not None and self.revoked_s is None

    @property
    def invited(self) -> bool:
        """Whether it has a token, good or expired, and no certificate yet."""
        return self.certificate is None and self.revoked_s is None

    def may_enrol(self, now_s: float) -> bool:
        """Whether its token is still good; until the device has come, the answer to it may have been lost."""
        return self.revoked_s is None and self.joined_s is None and now_s < self.expires_s


class Registry:
    """Every method is one transaction. Raises StateError when the file is unusable."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = folder / FILE_NAME, clock
        with self._explained():
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its other files the same mode
            self._db = sqlite3.connect(self._path, timeout=10, isolation_level=None)
            self._db.execute("PRAGMA synchronous=EXTRA")  # with a journal that is deleted, FULL may lose the last commit in a power cut
            with self._transaction():
                self._migrate()

    def close(self) -> None:
        self._db.close()

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise StateError(f"{self._path} was written by a newer cloud-server: upgrade this one")
        for table in TABLES:
            self._db.execute(table)
        if version == 1:
            self._db.execute("ALTER TABLE devices ADD COLUMN subject TEXT")
        if version != SCHEMA:  # or each that opens it would have changed something
            self._db.execute(f"PRAGMA user_version={SCHEMA}")

    @property
    def revision(self) -> int:
        """Another number whenever another process has changed something."""
        with self._explained():
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    @property
    def contact(self) -> Contact | None:
        with self._explained():
            row = self._db.execute("SELECT host, port, fleet FROM contact").fetchone()
        return None if row is None else Contact(*row)

    @contact.setter
    def contact(self, contact: Contact) -> None:
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO contact VALUES (1, ?, ?, ?)", (contact.host, contact.port, contact.fleet))

    @property
    def epoch(self) -> int:
        """The latest of any server's start; 0 before the first."""
        with self._explained():
            row = self._db.execute("SELECT epoch FROM starts").fetchone()
        return 0 if row is None else int(row[0])

    def claim(self, epoch: int) -> None:
        """Keep that of a start, durably, before devices hear of it. Raises StateError unless it is later than those before."""
        with self._transaction():
            if epoch <= self.epoch:
                raise StateError("another server of this authority was started at the same moment: start this one again")
            self._db.execute("INSERT OR REPLACE INTO starts VALUES (1, ?)", (epoch,))

    def devices(self) -> list[Device]:
        """By name."""
        return self._select("ORDER BY name")

    def device(self, name: str) -> Device | None:
        return next(iter(self._select("WHERE name = ?", name)), None)

    def of_token(self, token: str) -> Device | None:
        return next(iter(self._select("WHERE token = ?", token)), None)

    def invite(self, name: str, token: str, secret: str, lifetime_s: float) -> None:
        """Let a device enrol as `name`; what it has not come with is void. Raises StateError when it has joined or is revoked."""
        with self._transaction():
            known = self.device(name)
            if known is not None and known.revoked_s is not None:
                raise StateError(f"device {name} was revoked, and its certificate may still be about: choose another name")
            if known is not None and known.joined_s is not None:
                lost = f"if it is lost, or somebody else used its token, `cloud-server revoke {name}` as well"
                raise StateError(f"device {name} is enrolled: choose another name; {lost}")
            certified = known is not None and (known.certificate or known.subject)
            subject = f"{token}.{name}"[:SUBJECT] if certified else None
            row = (name, token, secret, self._clock() + lifetime_s, subject)
            self._db.execute("INSERT OR REPLACE INTO devices (name, token, secret, expires_s, subject) VALUES (?, ?, ?, ?, ?)", row)

    def certify(self, token: str, request: str, certificate: str) -> None:
        """Keep what was issued. Raises KeyError when another process has revoked or replaced the token since, or it is used."""
        with self._transaction():
            values = (request, certificate, token)
            found = self._db.execute(
                "UPDATE devices SET request = ?, certificate = ? WHERE token = ? AND certificate IS NULL AND revoked_s IS NULL", values
            )
            if found.rowcount != 1:
                raise KeyError(token)

    def confirm(self, name: str) -> None:
        """The device has come with its certificate: its token is used up. One whose certificate is void by now is too late."""
        with self._transaction():
            self._db.execute("UPDATE devices SET joined_s = ? WHERE name = ? AND certificate IS NOT NULL", (self._clock(), name))

    def revoke(self, name: str) -> None:
        """For ever; idempotent. Raises StateError when there is no such device."""
        with self._transaction():
            changed = self._db.execute("UPDATE devices SET revoked_s = coalesce(revoked_s, ?) WHERE name = ?", (self._clock(), name))
            if changed.rowcount != 1:
                names = ", ".join(one.name for one in self.devices() if one.revoked_s is None)
                raise StateError(f"no device {name!r} is invited or enrolled; there are: {names or 'none'}")

    def _select(self, condition: str, *values: Any) -> list[Device]:
        names = tuple(Device.__dataclass_fields__)
        with self._explained():
            rows = self._db.execute(f"SELECT {', '.join(names)} FROM devices {condition}", values).fetchall()  # noqa: S608 - ours
        return [Device(**dict(zip(names, row, strict=True))) for row in rows]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained(), transaction(self._db):
            yield

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise disk.unusable(f"the record of devices {self._path} is unusable ({error}): check its folder and its disk", error) from None


def next_epoch(folder: Path) -> int:
    """Later than that of any start with the registry in `folder`, which there need not be yet. Raises StateError."""
    if not os.path.isfile(folder / FILE_NAME):
        return 1
    with contextlib.closing(Registry(folder)) as registry:
        return registry.epoch + 1
