"""Where programs keep their state, and that only one process uses it at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lwfed.errors import StateError

LOCK_NAME = "lock"


def state_home(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder for state by the XDG Base Directory Specification; a relative or empty $XDG_STATE_HOME does not count."""
    named = environ.get("XDG_STATE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path.home() / ".local" / "state"


@contextmanager
def locked_state(root: Path, hint: str) -> Iterator[Path]:
    """Create `root` (for its owner only) and hold it until the end of the block or of the process, however it ends.

    `hint` says what to do when another process holds it, e.g. ``use another --state``. Raises StateError.
    """
    handle = _open(root)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
            raise StateError(f"{root} is in use by another process{f' ({owner})' if owner else ''}: {hint}") from None
        except OSError as error:
            raise StateError(f"cannot lock {root}: {error.strerror or error}; keep the state on a local disk") from None
        with suppress(OSError):  # for people alone
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()}\n".encode(), 0)
        yield root
    finally:
        os.close(handle)


def in_use(root: Path) -> bool:
    """Whether a process holds `root`. Asking shares the lock for an instant, so that those who ask do not see each other."""
    try:
        with (root / LOCK_NAME).open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _open(root: Path) -> int:
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"cannot use {error.filename or root} for state: {error.strerror or error}; check its permissions") from None
