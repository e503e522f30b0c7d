"""Updates of devices as weights, whatever they were sent as: checked when they arrive, read when they are aggregated."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from lwfed.cloud_server.updates import Array, Index, Read, weights
from lwfed.config import TransferSection
from lwfed.errors import InvalidPayload, StateError
from lwfed.plan import STATISTICS, VARIANCE
from lwfed.wire import deltas, tensors
from lwfed.wire.sizes import stated_shapes

FAR = 10.0  # times the norm of what a device received: no training that converges moves weights so far in a round
MAX_DIFFERENCE = 1e18  # of a number in a round: float32 says 1e20 times that, so no rounds of them make what no difference can tell


def check(transfer: TransferSection, received: Collection[Path], update: Path) -> None:
    """Raises InvalidPayload unless devices that began with the files `received` may upload `update`, and it makes sound weights."""
    before = {name: tensor for path in received for name, tensor in tensors.read(path).items()}
    size = moved = 0.0
    for name, after, difference in _changes(transfer, before, update):
        if (np.abs(difference) > MAX_DIFFERENCE).any():
            raise InvalidPayload(f"tensor {name} holds differences above {MAX_DIFFERENCE:g}")
        if name.endswith(VARIANCE) and (after < 0).any():
            raise InvalidPayload(f"tensor {name} holds variances below 0")
        if not name.endswith(STATISTICS):
            size, moved = size + _square(before[name]), moved + _square(difference)
    if math.sqrt(moved) > FAR * (math.sqrt(size) + 1):
        raise InvalidPayload(f"it moves weights with an L2 norm of {math.sqrt(size):.3g} by {math.sqrt(moved):.3g}: training has exploded")


Change = tuple[str, tensors.Array, tensors.Array]  # name, weights, and what they differ by from those before


def _changes(transfer: TransferSection, before: Mapping[str, tensors.Array], update: Path) -> Iterator[Change]:
    """Of each tensor. Raises InvalidPayload."""
    shapes = {name: tensor.shape for name, tensor in before.items()}
    if transfer.codec == "fp32":
        for name, after in tensors.iterate(update, shapes):
            with np.errstate(over="ignore"):  # infinity is far too much
                yield name, after, after - before[name]
        return
    for name, difference in deltas.iterate(update.read_bytes(), shapes, transfer.codec):
        yield name, before[name] + difference, difference


def _square(tensor: tensors.Array) -> float:
    return float(np.square(tensor, dtype=np.float64).sum())


@contextmanager
def unpacked(
    transfer: TransferSection, received: Iterable[Path], updates: Mapping[int, Path], folder: Path
) -> Iterator[tuple[dict[int, Path], Read]]:
    """Files in which any block of a tensor can be read, and how: `updates` by participant, whose content has been checked.

    Differences to `received`, the files of the parts that the devices began with, are decompressed below `folder`, and are
    there while the block lasts; one that the disk has spoilt is left out. Raises StateError where the disk has no room.
    """
    if transfer.codec == "fp32":
        yield dict(updates), weights
        return
    layout = deltas.Layout(_shapes(received), transfer.codec)
    try:
        yield _decompressed(layout, updates, folder), partial(_differences, layout)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _decompressed(layout: deltas.Layout, updates: Mapping[int, Path], folder: Path) -> dict[int, Path]:
    files = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for participant, path in updates.items():
            with suppress(InvalidPayload):
                raw = deltas.decompress(path.read_bytes(), layout)
                (folder / str(participant)).write_bytes(raw)
                files[participant] = folder / str(participant)
    except OSError as error:
        raise StateError(
            f"updates cannot be decompressed in {folder}: {error.strerror}; free about {layout.bytes * len(updates) >> 20} MiB there"
        ) from error
    return files


def _differences(layout: deltas.Layout, path: Path, name: str, before: Array, index: Index) -> Array:
    with path.open("rb") as file:
        raw = mmap(file.fileno(), 0, access=ACCESS_READ)  # np.memmap looks at every folder above
    return np.asarray(before[index] + layout.read(raw, name, index))


def _shapes(received: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    return {name: shape for path in received for name, shape in stated_shapes(path).items()}
