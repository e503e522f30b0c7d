"""What an operator orders of a run from another process: small files in a folder of the run.

A server that runs looks there once a second, one that does not when it is started, before any round begins. An order is
deleted once it is carried out, so a crash in between carries it out twice: every order must bear that.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lwfed import disk
from lwfed.errors import StateError

FOLDER = "orders"
LOOK_EVERY_S = 1.0


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    do: Literal["pause", "resume"]
    now: bool = False  # pause: withdraw the round under way, instead of letting it end


def give(root: Path, order: Order) -> None:
    """Put `order` behind those that wait in the run's folder. Raises StateError."""
    folder = root / FOLDER
    unfinished = folder / f".{os.getpid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished.write_text(order.model_dump_json())
        last = max((int(path.stem) for path in waiting(root)), default=0)
        for number in itertools.count(last + 1):
            try:
                os.link(unfinished, folder / f"{number:09d}.json")  # unlike a rename it never replaces another's order
                break
            except FileExistsError:
                continue
        unfinished.unlink()
    except OSError as error:
        raise StateError(f"cannot write {error.filename or folder}: {error.strerror or error}; check free space and permissions") from None


def waiting(root: Path) -> list[Path]:
    """The files of orders not carried out yet, oldest first."""
    return sorted(path for path in (root / FOLDER).glob("*.json") if path.stem.isdecimal() and path.is_file())


def to_go_on(root: str | Path, in_database: bool) -> str:
    """The command that ends a pause; of the address of a database only that it is needed, for it may have a password."""
    return f"cloud-server resume --state {root}{' --database URL' if in_database else ''}"


def forget(path: Path) -> None:
    """It is carried out. Raises StateError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise disk.unusable(f"cannot delete {path}, which is carried out: {error.strerror or error}", error) from None


def read(path: Path) -> Order:
    """Raises StateError."""
    try:
        return Order.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StateError(f"{path} holds no order that this cloud-server knows ({type(error).__name__}); it is dropped") from None
