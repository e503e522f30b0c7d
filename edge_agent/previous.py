"""A device's own updates, kept for the representation alignment of MOON, which compares with the one before.

What a round compares with is the newest update that this device made in an earlier round of the same stage. It stays until
a later round is done, so a round that is repeated compares with the same and gives the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from lwfed.config import RunConfig

NAME = "previous"  # of all files here; nothing else in the folder begins so


class Previous:
    """Those of one stage of one run, in `folder`."""

    def __init__(self, folder: Path, config: RunConfig, stage: int, participant: int) -> None:
        self._folder, self._name = folder, f"{NAME}-{config.digest[:16]}-{participant}-{stage}"
        self._planned = config.round_counts[stage - 1]

    def before(self, round: int) -> Path | None:
        """The file of the newest update of an earlier round; of this attempt, where the stage collapsed and is repeated."""
        first = (round - 1) // self._planned * self._planned + 1
        rounds = [number for number in self._rounds() if first <= number < round]
        return self._path(max(rounds)) if rounds else None

    def keep(self, round: int, update: bytes) -> None:
        """Keep the update of `round` and the one that it was compared with, and no others."""
        compared = self.before(round)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_durably(self._path(round), update)
        forget(self._folder, {self._path(round), compared})

    def _path(self, round: int) -> Path:
        return self._folder / f"{self._name}-{round}.safetensors"

    def _rounds(self) -> list[int]:
        return [int(path.stem.rpartition("-")[2]) for path in self._folder.glob(f"{self._name}-*.safetensors")]


def forget(folder: Path, but: Collection[Path | None] = ()) -> None:
    """Delete what is kept here, of whatever run."""
    for path in folder.glob(f"{NAME}-*"):
        if path not in but:
            path.unlink()


def write_durably(path: Path, data: bytes) -> None:
    """All of it or nothing, also after a power cut."""
    temporary = path.with_suffix(".part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
