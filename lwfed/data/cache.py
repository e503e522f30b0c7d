"""Decoded images on disk: made once, then read as they are wanted (`lwfed.data.kept`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lwfed.data.images import Pixels, Shape
from lwfed.data.kept import KeptPixels


def load(folder: Path, name: str, key: str) -> tuple[KeptPixels, npt.NDArray[np.int64]] | None:
    """The images kept under `key`, and the row numbers that `store` was given for them; None if there are none."""
    pixels_file, index_file = _files(folder, name, key)
    try:
        rows = np.asarray(json.loads(index_file.read_text("utf-8")), dtype=np.int64)
        return KeptPixels(pixels_file, len(rows)), rows
    except (OSError, ValueError):
        return None


def store(folder: Path, name: str, key: str, count: int, shape: Shape, found: Iterable[tuple[int, Pixels]]) -> None:
    """Keep up to `count` images, given one by one with their row numbers, in place of those `name` had under another key.

    The pixels' file appears last, so that a power cut leaves nothing that `load` would take. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pixels_file, index_file = _files(folder, name, key)
    for old in folder.glob(f"{name}-*"):
        old.unlink()
    temporary = pixels_file.with_suffix(".part")
    sizes = (count, shape.channels, shape.size, shape.size)
    rows: list[int] = []
    with open(temporary, "wb") as file:  # plain writes: pages of a mapped file would count as our memory
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": sizes})
        end = file.tell() + count * shape.channels * shape.size**2
        for row, image in found:
            file.write(image.tobytes())
            rows.append(row)
        file.truncate(end)  # rows of unreadable files stay a hole at the end
        file.flush()
        os.fsync(file.fileno())
    with open(index_file, "w", encoding="utf-8") as index:
        json.dump(rows, index)
        index.flush()
        os.fsync(index.fileno())
    temporary.replace(pixels_file)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path, name: str, key: str) -> tuple[Path, Path]:
    return folder / f"{name}-{key}.npy", folder / f"{name}-{key}.json"
