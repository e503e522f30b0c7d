"""Where tokens of views that are used again are kept, and how.

In a file, which the system holds in memory while there is room and which outlives the process, or in memory of this
process. The layout is the same: of each row in turn the tokens of each view, as float16, or as int8 with a scale for each
channel: channels differ more than positions do, and a scale for each token would be off by twice as much. After the tokens of
each view comes their CRC-32, for disks give back other bytes than they were given, SD cards above all.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

FREE_SHARE = 0.5  # of the free disk, at most
UNFINISHED = ".part"
SUFFIX = ".features"
STEPS = 127  # of int8, each way
ROWS_AT_ONCE = 32  # while they are rounded, in float32
CHECKSUM_BYTES = 4
LEAST_SCALE = torch.finfo(torch.float16).tiny


@dataclass(frozen=True)
class Layout:
    """Of the tokens of one view: what is rounded, and how it lies."""

    shape: tuple[int, ...]  # [tokens, width] or [channels, height, width]
    kept_as: Literal["fp16", "int8"]

    @property
    def bytes(self) -> int:
        numbers = math.prod(self.shape)
        return 2 * numbers if self.kept_as == "fp16" else numbers + 2 * self._channels

    @property
    def kept_bytes(self) -> int:
        return self.bytes + CHECKSUM_BYTES

    def encode(self, tokens: Tensor) -> Tensor:
        """[B, *shape] -> uint8 [B, bytes]. Halves are rounded to even."""
        if self.kept_as == "fp16":
            return tokens.half().flatten(1).contiguous().view(torch.uint8)
        return _in_pieces(self._rounded, tokens, tokens.new_empty(len(tokens), self.bytes, dtype=torch.uint8))

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [B, bytes] -> float16 [B, *shape]."""
        if self.kept_as == "fp16":
            return data.view(torch.float16).reshape(len(data), *self.shape)
        return _in_pieces(self._numbers, data, data.new_empty(len(data), *self.shape, dtype=torch.float16))

    def _rounded(self, tokens: Tensor) -> Tensor:
        numbers = tokens.float()
        scale = (numbers.abs().amax(self._positions, keepdim=True) / STEPS).clamp_min(LEAST_SCALE).half()
        steps = torch.round(numbers / scale).to(torch.int8)
        return torch.cat([scale.flatten(1).view(torch.uint8), steps.flatten(1).view(torch.uint8)], 1)

    def _numbers(self, data: Tensor) -> Tensor:
        scales, steps = data[:, : 2 * self._channels], data[:, 2 * self._channels :]
        scale = scales.clone(memory_format=torch.contiguous_format).view(torch.float16)  # rows need not begin at an even byte
        for axis in self._positions:
            scale = scale.unsqueeze(axis)
        return (scale.float() * steps.view(torch.int8).reshape(len(data), *self.shape)).half()

    @property
    def _channels(self) -> int:
        return self.shape[-1] if len(self.shape) == 2 else self.shape[0]

    @property
    def _positions(self) -> tuple[int, ...]:
        return (1,) if len(self.shape) == 2 else (2, 3)


class Place(Protocol):
    """Keeps bytes under names."""

    def names(self) -> list[str]: ...

    def size(self, name: str) -> int | None:
        """Bytes; None where there are none of that name."""

    def room(self) -> float:
        """Bytes for one more. Raises OSError."""

    def write(self, name: str, blocks: Iterable[Tensor], room: float) -> None:
        """As many rows of uint8 [rows, bytes] as there is room for. Raises OSError."""

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """For reading. Raises OSError."""

    def mend(self, name: str, at: int, block: Tensor) -> None:
        """Put `block` in the place of as many bytes, from byte `at`. Raises OSError."""

    def forget(self, but: str | None = None) -> None: ...

    def remedy(self, wanted: float) -> str:
        """For people: what gives room for so many bytes, where there was none."""


@dataclass(frozen=True)
class Folder:
    """On the disk. One that is full costs time only. Read and not mapped, files count as the system's memory and not as this process's."""

    path: Path
    room_bytes: float = math.inf  # at most
    spare_bytes: float = 0.0  # of the free disk, left to others
    raises_room: str = ""  # for people: what raises `room_bytes`

    def names(self) -> list[str]:
        with contextlib.suppress(OSError):
            return [file.stem for file in self.path.iterdir() if file.suffix == SUFFIX]
        return []

    def size(self, name: str) -> int | None:
        with contextlib.suppress(OSError):
            return self._file(name).stat().st_size
        return None

    def room(self) -> float:
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        held = sum(file.stat().st_size for file in self.path.iterdir())
        free = shutil.disk_usage(self.path).free
        return min(self.room_bytes - held, FREE_SHARE * free, free - self.spare_bytes)

    def write(self, name: str, blocks: Iterable[Tensor], room: float) -> None:
        temporary = self.path / f"{name}{UNFINISHED}"
        made = temporary.open("wb")
        with contextlib.suppress(OSError), made as file:
            _fill(file, blocks, room)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._file(name))

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return self._file(name).open("rb", buffering=0)

    def mend(self, name: str, at: int, block: Tensor) -> None:
        with self._file(name).open("r+b", buffering=0) as file:
            _put(file, at, block)

    def forget(self, but: str | None = None) -> None:
        with contextlib.suppress(OSError):
            for file in self.path.iterdir():
                if file.name != f"{but}{SUFFIX}":
                    file.unlink()

    def remedy(self, wanted: float) -> str:
        return self.raises_room if wanted > self.room_bytes else "free some space on the disk of the state directory"

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{SUFFIX}"


class Memory:
    """Of this process, for as long as this object lives."""

    def __init__(self, room_bytes: float) -> None:
        self._room_bytes = room_bytes
        self._held: dict[str, io.BytesIO] = {}

    def names(self) -> list[str]:
        return list(self._held)

    def size(self, name: str) -> int | None:
        return len(self._held[name].getbuffer()) if name in self._held else None

    def room(self) -> float:
        return self._room_bytes - sum(len(held.getbuffer()) for held in self._held.values())

    def write(self, name: str, blocks: Iterable[Tensor], room: float) -> None:
        self._held[name] = io.BytesIO()
        with contextlib.suppress(MemoryError):
            _fill(self._held[name], blocks, room)

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        if name not in self._held:
            raise FileNotFoundError(name)
        return contextlib.nullcontext(self._held[name])

    def mend(self, name: str, at: int, block: Tensor) -> None:
        _put(self._held[name], at, block)

    def forget(self, but: str | None = None) -> None:
        self._held = {name: held for name, held in self._held.items() if name == but}

    def remedy(self, wanted: float) -> str:
        return "free some memory"


def sealed(data: Tensor) -> Tensor:
    """uint8 [B, bytes] -> uint8 [B, bytes + 4] in main memory: each row and its CRC-32."""
    rows = data.cpu().numpy()
    sums = np.fromiter(map(zlib.crc32, rows), "<u4", len(rows))
    return torch.from_numpy(np.concatenate([rows, sums.view(np.uint8).reshape(len(rows), CHECKSUM_BYTES)], 1))


def unsealed(data: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, bytes + 4] -> uint8 [B, bytes], and bool [B]: of which rows the CRC-32 is right."""
    rows, sums = data[:, :-CHECKSUM_BYTES], data[:, -CHECKSUM_BYTES:].numpy().copy().view("<u4").ravel()
    return rows, torch.from_numpy(np.fromiter(map(zlib.crc32, rows.numpy()), "<u4", len(rows)) == sums)


def read(place: Place, name: str, rows: Tensor, row_bytes: int, view: slice) -> Tensor:
    """uint8 [B, view]: those bytes of `rows` [B]. Raises OSError."""
    found = np.empty((len(rows), view.stop - view.start), np.uint8)
    with place.open(name) as file:
        for at, row in enumerate(rows.tolist()):
            file.seek(row * row_bytes + view.start)
            if file.readinto(found[at]) != found.shape[1]:  # type: ignore[attr-defined]
                raise OSError(f"{name} is shorter than it was")
    return torch.from_numpy(found)


def _in_pieces(one: Callable[[Tensor], Tensor], given: Tensor, found: Tensor) -> Tensor:
    """`found`, filled with what `one` makes of some rows of `given` at a time."""
    for first in range(0, len(given), ROWS_AT_ONCE):
        found[first : first + ROWS_AT_ONCE] = one(given[first : first + ROWS_AT_ONCE])
    return found


def _put(file: IO[bytes], at: int, block: Tensor) -> None:
    file.seek(at)
    file.write(block.numpy().data)


def _fill(file: IO[bytes], blocks: Iterable[Tensor], room: float) -> None:
    for block in blocks:
        fit = int((room - file.tell()) // block.shape[1])
        file.write(block[: max(0, fit)].cpu().numpy().data)
        if fit < len(block):
            return
