"""Images of a folder, decoded one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lwfed.data import cache, images, scan
from lwfed.data.images import Images, Pixels, Shape
from lwfed.data.kept import KeptPixels
from lwfed.data.source import Progress
from lwfed.errors import DataError, StateError


def read(folder: Path, files: list[Path], shape: Shape, name: str, kept: Path | None, progress: Progress | None) -> Images:
    """The readable images among `files` below `folder`; with `kept`, in a file there under `name`.

    Raises DataError when no file can be read, StateError when `kept` cannot be written.
    """
    pixels, rows = (
        _decode_in_memory(files, shape, progress) if kept is None else _decode_to_disk(folder, files, shape, name, kept, progress)
    )
    if files and not len(rows):
        scan.require_readable(folder, files)
        raise DataError(f"none of the {len(files)} image files in {str(folder)!r} can be read to its end: are they complete?")
    classes = scan.classes(folder, files)
    labels = np.array(scan.class_numbers(folder, [files[row] for row in rows], classes), dtype=np.int64) if classes else None
    return Images(pixels, labels, classes, skipped=len(files) - len(rows))


def _decode_in_memory(files: list[Path], shape: Shape, progress: Progress | None) -> tuple[Pixels, npt.NDArray[np.int64]]:
    decoded = list(_decode(files, shape, progress))
    pixels = np.empty((len(decoded), shape.channels, shape.size, shape.size), np.uint8)
    for place, (_, image) in enumerate(decoded):
        pixels[place] = image
    return pixels, np.array([row for row, _ in decoded], dtype=np.int64)


def _decode_to_disk(
    folder: Path, files: list[Path], shape: Shape, name: str, kept: Path, progress: Progress | None
) -> tuple[KeptPixels, npt.NDArray[np.int64]]:
    key = digest(shape.size, shape.channels, [_version(folder, path) for path in files])
    return cache.load(kept, name, key) or keep(kept, name, key, len(files), shape, _decode(files, shape, progress))


def _decode(files: list[Path], shape: Shape, progress: Progress | None) -> Iterator[tuple[int, Pixels]]:
    for row, path in enumerate(files):
        image = images.read(path, shape)
        if progress:
            progress(row + 1, len(files))
        if image is not None:
            yield row, image


def _version(folder: Path, path: Path) -> tuple[str, int, int]:
    """What changes when somebody replaces the file; a dangling link has no size."""
    name = str(path.relative_to(folder))
    try:
        status = path.stat()
    except OSError:
        return name, 0, 0
    return name, status.st_size, status.st_mtime_ns


def keep(
    kept: Path, name: str, key: str, count: int, shape: Shape, found: Iterator[tuple[int, Pixels]]
) -> tuple[KeptPixels, npt.NDArray[np.int64]]:
    """`cache.store` and `cache.load` of it, with errors that say what to do."""
    try:
        cache.store(kept, name, key, count, shape, found)
    except OSError as error:
        raise StateError(f"decoded images cannot be kept in {str(kept)!r} ({error.strerror}): free some disk space") from None
    ready = cache.load(kept, name, key)
    if ready is None:
        raise StateError(f"decoded images cannot be read back from {str(kept)!r}: check the disk")
    return ready


def digest(*what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
