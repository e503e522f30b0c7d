"""What is to be there after a power cut: every file that a program promises to keep comes to the disk through here.

A simulation can be that disk (`instead`), and forget at a power cut what nobody has synced.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lwfed.errors import DiskTrouble, StateError

PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
PASSING_WORDS = ("disk is full", "disk I/O error", "database is locked")  # of SQLite
Sync = Callable[[Path], None]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_SYNC: ContextVar[Sync] = ContextVar("sync", default=_fsync)


def sync(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk."""
    _SYNC.get()(path)


@contextmanager
def instead(other: Sync) -> Iterator[None]:
    """Within the block, and in this thread, `other` syncs."""
    token = _SYNC.set(other)
    try:
        yield
    finally:
        _SYNC.reset(token)


def install(temporary: Path, path: Path) -> None:
    """Rename a file that has been written, so that it is whole under its name or not there at all, also after a power cut."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write(path: Path, data: bytes) -> None:
    """All of it or nothing, also after a power cut. Raises OSError."""
    temporary = path.with_suffix(".part")
    try:
        temporary.write_bytes(data)
        install(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def unusable(text: str, error: Exception) -> StateError:
    """`text` as the error that says whether to try again: a disk that is full, or failed once, or a file that somebody holds."""
    passes = error.errno in PASSING if isinstance(error, OSError) else any(words in str(error) for words in PASSING_WORDS)
    return DiskTrouble(text) if passes else StateError(text)
