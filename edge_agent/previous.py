"""What a device keeps of a round for its next one of the stage: its update, for alignment by MOON, or what encoding it has lost.

A round reads what was kept in the last earlier one whose update the server took (`journal`): what came of an update that never
counted counts for nothing. Of two such rounds files are kept, so a round that is repeated reads the same and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lwfed import disk
from lwfed.config import RunConfig
from lwfed.config.learning import learning_digest
from lwfed.errors import InvalidPayload
from lwfed.wire import tensors
from lwfed.wire.sizes import Shapes

Kind = Literal["previous", "residual"]  # of all files here; nothing else in the folder begins so


@dataclass(frozen=True)
class Turn:
    """A round of a device."""

    stage: int
    round: int
    participant: int
    after: int | None  # the last earlier round of the stage whose update the server took


class Previous:
    """What one round of a run reads and keeps, in `folder`."""

    def __init__(self, kind: Kind, folder: Path, config: RunConfig, turn: Turn) -> None:
        self._kind, self._folder, self._turn = kind, folder, turn
        self._name = f"{kind}-{learning_digest(config)[:16]}-{turn.participant}-{turn.stage}"
        self._planned = config.round_counts[turn.stage - 1]

    @property
    def before(self) -> Path | None:
        """The file that this round reads, if any: of this attempt, where the stage collapsed and is repeated."""
        round, after = self._turn.round, self._turn.after
        first = (round - 1) // self._planned * self._planned + 1
        return self._path(after) if after is not None and first <= after < round else None

    def read(self, shapes: Shapes, warn: Callable[[str], object]) -> dict[str, tensors.Array] | None:
        """Its tensors; where it is lost training goes on without, and that is said."""
        if (file := self.before) is None:
            return None
        try:
            return tensors.decode(file, shapes)
        except (InvalidPayload, OSError) as error:
            warn(f"{file.name}, kept of an earlier round, cannot be read ({error}): training goes on without it")
            return None

    def keep(self, data: bytes) -> None:
        """Keep `data` of this round and the file that it has read, and no others."""
        path = self._path(self._turn.round)
        self._folder.mkdir(parents=True, exist_ok=True)
        disk.write(path, data)
        forget(self._kind, self._folder, {path, self.before})

    def _path(self, round: int) -> Path:
        return self._folder / f"{self._name}-{round}.safetensors"


def forget(kind: Kind, folder: Path, but: Collection[Path | None] = ()) -> None:
    """Delete what is kept here, of whatever run."""
    for path in folder.glob(f"{kind}-*"):
        if path not in but:
            path.unlink()
