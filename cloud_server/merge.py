"""The round's updates, as files, made one model: what the server's worker does when a round has closed, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lwfed.child import Json
from lwfed.cloud_server.aggregate import Fallback, Screened, combine, screen
from lwfed.cloud_server.updates import Share, Updates
from lwfed.cloud_server.weights import unpacked
from lwfed.config import RunConfig
from lwfed.wire import tensors


@dataclass(frozen=True)
class Merged:
    """Devices are named by their participant numbers."""

    parts: Mapping[str, str]  # part -> file; none: no update was left, and the round changes nothing
    counted: tuple[int, ...]
    clipped: Mapping[int, float]  # what is left of a device's delta
    left_out: tuple[int, ...]
    fallback: Fallback | None  # what was taken instead of Krum, which had too few updates
    lost: tuple[int, ...]  # the disk has spoilt their updates

    @classmethod
    def of(cls, result: Json) -> Merged:
        """As the worker says it: JSON knows neither tuples nor numbers as keys."""
        counted, left_out, lost = (tuple(result[name]) for name in ("counted", "left_out", "lost"))
        clipped = {int(participant): scale for participant, scale in result["clipped"].items()}
        return cls(result["parts"], counted, clipped, left_out, result["fallback"], lost)


def merge(config: RunConfig, job: Json) -> Merged:
    """Part by part, in files below the folder of the job. Raises StateError where the disk has no room."""
    received = {part: Path(file) for part, file in job["parts"].items()}
    images = {participant: count for participant, count, _ in job["updates"]}
    updates = {participant: Path(file) for participant, _, file in job["updates"]}
    out = Path(job["out"])
    with unpacked(config.transfer, received.values(), updates, out / "unpacked") as (files, read):
        lost = tuple(sorted({*job["lost"], *(updates.keys() - files.keys())}))
        if not files:
            return _merged({}, Screened(()), lost)
        shares = Updates(received, [Share(participant, images[participant], file) for participant, file in files.items()], read)
        screened = screen(config.aggregation, shares)
        parts = {}
        for part, merged in combine(config.aggregation, screened, shares):
            (out / part).write_bytes(tensors.encode(merged))
            parts[part] = str(out / part)
        return _merged(parts, screened, lost)


def _merged(parts: Mapping[str, str], screened: Screened, lost: tuple[int, ...]) -> Merged:
    counted = tuple(share.participant for share in screened.shares)
    return Merged(parts, counted, screened.clipped, screened.left_out, screened.fallback, lost)
