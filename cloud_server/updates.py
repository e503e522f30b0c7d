"""The updates of a round, read from files: a tensor of one device, or a block of it, at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Array = npt.NDArray[np.float32]
Index = tuple[slice, ...]  # of a block of a tensor; (): all of it
Read = Callable[[str, Array, Index], Array]  # (name, the tensor as its device received it, index) -> that block of its update
Open = Callable[[Path], AbstractContextManager[Read]]

OPEN_FILES = 64  # each is mapped into memory; more are opened anew for every tensor
BLOCK_NUMBERS = 1 << 20  # of all devices together: 4 MiB, and some copies in float64


@dataclass(frozen=True)
class Share:
    """One device's update. Its content has been checked against the plan."""

    participant: int
    images: int  # |D_n|, its weight, as the device states it
    path: Path
    scale: float = 1.0  # what clipping leaves of its delta


@contextmanager
def weights(path: Path) -> Iterator[Read]:
    """An update that is a file of weights."""
    with safe_open(path, framework="numpy") as file:
        yield lambda name, before, index: np.asarray(file.get_slice(name)[index] if index else file.get_tensor(name))


class Updates:
    """Those of a round, in the order of participants, and the model that they began from, as a context with open files."""

    def __init__(self, received: Mapping[str, Path], shares: Iterable[Share], open: Open = weights) -> None:
        """`received`: the files of the parts as the devices received them; `open` opens a share's. Raises ValueError without shares."""
        self.shares = tuple(sorted(shares, key=lambda share: share.participant))
        if not self.shares:
            raise ValueError("there is nothing to aggregate")
        self._received, self._open = received, open
        self._stack = ExitStack()
        self._opened: dict[Path, Read] = {}

    def __enter__(self) -> Updates:
        for share in self.shares[:OPEN_FILES]:
            self._opened[share.path] = self._stack.enter_context(self._open(share.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.clear()
        self._stack.close()

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
        theirs = self._read(share, name, before, index)
        if share.scale == 1:
            return theirs
        origin = before[index].astype(np.float64)
        return (origin + share.scale * (theirs - origin)).astype(np.float32)

    def blocks(self, shares: Sequence[Share], name: str, before: Array) -> Iterator[tuple[Index, Array]]:
        """Tensor `name` of all `shares` [N, ...], block by block."""
        for index in cut(before.shape, max(1, BLOCK_NUMBERS // len(shares))):
            yield index, np.stack([self.read(share, name, before, index) for share in shares])

    def _read(self, share: Share, name: str, before: Array, index: Index) -> Array:
        if share.path in self._opened:
            return self._opened[share.path](name, before, index)
        with self._open(share.path) as read:
            return read(name, before, index)


def cut(shape: Sequence[int], limit: int) -> Iterator[Index]:
    """Indices of blocks of at most `limit` numbers that make up a tensor of `shape`."""
    if math.prod(shape) <= limit:
        yield ()
        return
    rows = limit // math.prod(shape[1:])
    for start in range(0, shape[0], max(1, rows)):
        along = slice(start, min(start + max(1, rows), shape[0]))
        yield from ((along, *rest) for rest in ([()] if rows else cut(shape[1:], limit)))
