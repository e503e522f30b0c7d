"""The updates of a round, read from files: a tensor of one device, or a block of it, at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Array = npt.NDArray[np.float32]
Index = tuple[slice, ...]  # of a block of a tensor; (): all of it
Read = Callable[[Path, str, Array, Index], Array]  # (update, name, the tensor as its device received it, index) -> that block of the update

BLOCK_NUMBERS = 1 << 20  # of all devices together: 4 MiB, and some copies in float64


@dataclass(frozen=True)
class Share:
    """One device's update. Its content has been checked against the plan."""

    participant: int
    images: int  # |D_n|, its weight, as the device states it
    path: Path
    scale: float = 1.0  # what clipping leaves of its delta


def weights(path: Path, name: str, before: Array, index: Index) -> Array:
    """A block of an update that is a file of weights."""
    with safe_open(path, framework="numpy") as file:
        return np.asarray(file.get_slice(name)[index] if index else file.get_tensor(name))


class Updates:
    """Those of a round, in the order of participants, and the model that they began from.

    A file is open while a block of it is read, and no longer: as long as it is mapped, what was read of it counts as our memory.
    """

    def __init__(self, received: Mapping[str, Path], shares: Iterable[Share], read: Read = weights) -> None:
        """`received`: the files of the parts as the devices received them; `read` reads a share's. Raises ValueError without shares."""
        self.shares = tuple(sorted(shares, key=lambda share: share.participant))
        if not self.shares:
            raise ValueError("there is nothing to aggregate")
        self._received, self._read = received, read

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self._received)

    def tensors(self, *parts: str) -> Iterator[tuple[str, Array]]:
        """Name and value of each tensor of these parts, as the devices received it."""
        for part in parts:
            with safe_open(self._received[part], framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118, no mapping
                    yield name, file.get_tensor(name)

    def read(self, share: Share, name: str, before: Array, index: Index = ()) -> Array:
        """A block of tensor `name` of a device, clipped; `before` is the whole tensor as it received it."""
        theirs = self._read(share.path, name, before, index)
        if share.scale == 1:
            return theirs
        origin = before[index].astype(np.float64)
        return (origin + share.scale * (theirs - origin)).astype(np.float32)

    def blocks(self, shares: Sequence[Share], name: str, before: Array) -> Iterator[tuple[Index, Array]]:
        """Tensor `name` of all `shares` [N, ...], block by block."""
        for index in cut(before.shape, max(1, BLOCK_NUMBERS // len(shares))):
            yield index, np.stack([self.read(share, name, before, index) for share in shares])


def cut(shape: Sequence[int], limit: int) -> Iterator[Index]:
    """Indices of blocks of at most `limit` numbers that make up a tensor of `shape`."""
    if math.prod(shape) <= limit:
        yield ()
        return
    rows = limit // math.prod(shape[1:])
    for start in range(0, shape[0], max(1, rows)):
        along = slice(start, min(start + max(1, rows), shape[0]))
        yield from ((along, *rest) for rest in ([()] if rows else cut(shape[1:], limit)))
