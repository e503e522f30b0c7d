"""Files that only their owner may read: keys, and what lets somebody in."""

from __future__ import annotations

import os
from pathlib import Path

from lwfed import disk
from lwfed.errors import StateError


def write_private(path: Path, content: bytes) -> None:
    """Write `path` as a whole or not at all, with mode 0600, on disk when this returns. Raises StateError."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)  # its mode would stay
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        disk.install(fresh, path)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror or error}; check its folder and disk") from None
