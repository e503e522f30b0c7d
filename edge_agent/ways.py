"""How a device comes by the parts of a round: whole, or by patches to what it holds (docs/PROTOCOL.md, ways to a part)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lwfed.blobs import Holdings
from lwfed.wire.messages import BlobRef, Run
from lwfed.wire.sizes import Shape, stated_shapes


@dataclass(frozen=True)
class Way:
    """To one part: the whole is fetched, or patches to a base that is held."""

    part: BlobRef
    base: str | None = None
    patches: tuple[BlobRef, ...] = ()

    @property
    def fetched(self) -> tuple[BlobRef, ...]:
        return self.patches or (self.part,)


def needed(run: Run, ways: Mapping[str, Way]) -> Iterator[str]:
    """Blobs that a training process reads."""
    yield run.config.id
    yield from (graph.id for graph in run.graphs.values())
    for way in ways.values():
        yield from (blob.id for blob in way.fetched)
        if way.base is not None:
            yield way.base


class Pathfinder:
    """Chooses the shortest ways, and remembers which patches led nowhere."""

    def __init__(self, held: Holdings) -> None:
        self._held = held
        self._unpatchable: set[str] = set()  # parts that patches did not make

    def ways(self, run: Run) -> dict[str, Way]:
        """To each part of the round."""
        return {part: self._way(run, part, ref) for part, ref in run.parts.items()}

    def doubt(self, ways: Mapping[str, Way]) -> bool:
        """Trust the patches on these ways no longer; whether there were any."""
        made = {way.part.id for way in ways.values() if way.base is not None}
        self._unpatchable |= made
        return bool(made)

    def source(self, way: Way) -> str | dict[str, Any]:
        """Where the worker finds the part, once all is held."""
        if way.base is None:
            return str(self._held.path(way.part.id))
        patches = [str(self._held.path(blob.id)) for blob in way.patches]
        return {"base": str(self._held.path(way.base)), "patches": patches, "id": way.part.id}

    def shapes(self, ways: Iterable[Way]) -> dict[str, Shape]:
        """Of the tensors of these parts, once all is held. Raises InvalidPayload."""
        files = [self._held.path(way.base or way.part.id) for way in ways]
        return {name: shape for file in files for name, shape in stated_shapes(file).items()}

    def _way(self, run: Run, part: str, ref: BlobRef) -> Way:
        steps = run.patches.get(part, ())
        known = [number for number, step in enumerate(steps) if self._held.has(step.base)]
        if not known or ref.id in self._unpatchable or self._held.has(ref.id):
            return Way(ref)
        patches = tuple(step.blob for step in steps[known[-1] :])
        return Way(ref, steps[known[-1]].base, patches) if sum(blob.size for blob in patches) < ref.size else Way(ref)
