"""What a measurement makes for its time: it bears the number of its process, by which the next one finds what a killed one has left."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from lwfed.errors import StateError
from lwfed.locks import state_home

FOLDER = "profile-"


def make(place: Path, prefix: str) -> Path:
    """A new folder there. Raises OSError."""
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place))


def abandoned(place: Path, prefix: str) -> Iterator[Path]:
    """Folders that `make` has made there for processes that are no more."""
    for left in place.glob(f"{prefix}*"):
        if (pid := left.name.removeprefix(prefix).split("-")[0]).isdigit() and not psutil.pid_exists(int(pid)):
            yield left


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder where agents keep theirs, gone after the block. Raises StateError where it cannot hold what the block writes."""
    place = state_home() / "edge-agent"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for left in abandoned(place, FOLDER):
            shutil.rmtree(left, ignore_errors=True)
        folder = make(place, FOLDER)
    except OSError as error:
        raise _unusable(place, error) from None
    try:
        yield folder
    except OSError as error:
        raise _unusable(place, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unusable(place: Path, error: OSError) -> StateError:
    why = error.strerror or error
    return StateError(f"{place} cannot hold what is measured with ({why}): check its permissions and free space, or set XDG_STATE_HOME")
