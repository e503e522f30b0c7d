"""Decoded images in a file, as an array of which rows are read when they are asked for.

Read and not mapped: pages of a mapped file count as memory of the process that has touched them.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lwfed.errors import DataError


class KeptPixels:
    """uint8 [N, C, H, W] in a file of numpy's format, of which rows are read when they are asked for."""

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, count: int) -> None:
        """The first `count` images in `path`. Raises OSError and ValueError when they are not there."""
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            stored, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
            self._file = os.dup(file.fileno())  # what is read stays there when the file goes
        weakref.finalize(self, os.close, self._file)
        self._path = path
        self.shape = (count, *stored[1:])
        self._image_bytes = int(np.prod(stored[1:]))
        if dtype != self.dtype or stored[0] < count or path.stat().st_size < self._start + count * self._image_bytes:
            raise ValueError(f"{path} does not hold {count} images")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Raises DataError when the disk does not give them."""
        wanted = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        found = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        for image, row in zip(found, wanted, strict=True):
            if not 0 <= row < len(self):
                raise IndexError(f"no image {row} among {len(self)}")
            self._read(image, row)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[np.uint8]:
        """All of them, in memory."""
        return self[:]

    def _read(self, image: npt.NDArray[np.uint8], row: int) -> None:
        try:
            count = os.preadv(self._file, [image.data], self._start + row * self._image_bytes)
        except OSError as error:
            raise DataError(f"decoded images cannot be read from {str(self._path)!r} ({error.strerror}): check the disk") from None
        if count != self._image_bytes:
            raise DataError(f"decoded images in {str(self._path)!r} have been cut short: start again, and they are decoded anew")
