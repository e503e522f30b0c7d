"""What a device keeps of a round for its next one of the stage: its update, for alignment by MOON, or what encoding it has lost.

A round reads what was kept in the newest earlier round of the same stage. That stays until a later round is done, so a round
that is repeated reads the same and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from lwfed import disk
from lwfed.config import RunConfig

Kind = Literal["previous", "residual"]  # of all files here; nothing else in the folder begins so


class Previous:
    """Those of one stage of one run, in `folder`."""

    def __init__(self, kind: Kind, folder: Path, config: RunConfig, stage: int, participant: int) -> None:
        self._kind, self._folder = kind, folder
        self._name = f"{kind}-{config.digest[:16]}-{participant}-{stage}"
        self._planned = config.round_counts[stage - 1]

    def before(self, round: int) -> Path | None:
        """The file of the newest earlier round; of this attempt, where the stage collapsed and is repeated."""
        first = (round - 1) // self._planned * self._planned + 1
        rounds = [number for number in self._rounds() if first <= number < round]
        return self._path(max(rounds)) if rounds else None

    def keep(self, round: int, data: bytes) -> None:
        """Keep that of `round` and the one that it has read, and no others."""
        compared = self.before(round)
        self._folder.mkdir(parents=True, exist_ok=True)
        disk.write(self._path(round), data)
        forget(self._kind, self._folder, {self._path(round), compared})

    def _path(self, round: int) -> Path:
        return self._folder / f"{self._name}-{round}.safetensors"

    def _rounds(self) -> list[int]:
        return [int(path.stem.rpartition("-")[2]) for path in self._folder.glob(f"{self._name}-*.safetensors")]


def forget(kind: Kind, folder: Path, but: Collection[Path | None] = ()) -> None:
    """Delete what is kept here, of whatever run."""
    for path in folder.glob(f"{kind}-*"):
        if path not in but:
            path.unlink()
