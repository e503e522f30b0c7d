"""Data sets that are divided: their labels are read at once, their pixels row by row."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from lwfed.data import digits
from lwfed.data.archive import UNREADABLE, Archive, Member, Part, unreadable
from lwfed.data.images import Labels
from lwfed.data.partitions import Rows
from lwfed.data.source import Source
from lwfed.errors import DataError

Array = npt.NDArray[np.uint8]  # [H, W] grey or [H, W, 3] colour


@dataclass(frozen=True)
class ImageSet:
    count: int
    labels: Labels | None  # [count], indices into `classes`; None without one class per image ...
    unlabelled: str  # ... and this is why
    classes: tuple[str, ...]
    has_test_split: bool
    read: Callable[[Rows], Iterator[Array]]  # the images of rows given in ascending order, one by one; raises DataError


def open_set(source: Source, split: Literal["train", "test"] = "train") -> ImageSet:
    """The images of a divided source that are for training, or its test split. Raises DataError and MissingDependency."""
    if source.archived:
        return _archived(source.archive, split)
    if source.spec == "digits":
        if split == "test":
            raise DataError("digits has no test split")
        arrays, labels = digits.read()
        return _in_memory(arrays, labels, tuple(map(str, range(10))), has_test_split=False)
    from lwfed.data import torchvision_sets

    return _in_memory(*torchvision_sets.read(source.spec, split == "train"), has_test_split=True)


def _in_memory(arrays: Array, labels: Labels, classes: tuple[str, ...], has_test_split: bool) -> ImageSet:
    return ImageSet(len(arrays), labels, "", classes, has_test_split, lambda rows: (arrays[row] for row in rows))


def _archived(archive: Archive, split: Literal["train", "test"]) -> ImageSet:
    part = archive.train if split == "train" else archive.test
    if part is None:
        raise DataError(f"{str(archive.path)!r} has no test split with labels")
    labels: Labels | None = None
    classes: tuple[str, ...] = ()
    if not part.unlabelled:
        kinds, labels = np.unique(_labels(archive.path, part), return_inverse=True)
        classes = tuple(map(str, kinds))

    def read(rows: Rows) -> Iterator[Array]:
        return _read(archive.path, part.images, rows)

    return ImageSet(part.count, labels, part.unlabelled, classes, archive.test is not None, read)


def _labels(path: Path, part: Part) -> Labels:
    found = []
    for member in part.labels:
        with _opened(path, member) as stream:
            found.append(np.frombuffer(stream.read(), dtype=member.dtype).astype(np.int64))
    return np.concatenate(found)


def _read(path: Path, members: tuple[Member, ...], rows: Rows) -> Iterator[Array]:
    """Decompresses what lies between, and holds one image at a time."""
    first = 0
    for member in members:
        wanted = rows[(rows >= first) & (rows < first + member.count)] - first
        if len(wanted):
            yield from _read_member(path, member, wanted)
        first += member.count


def _read_member(path: Path, member: Member, rows: Rows) -> Iterator[Array]:
    size = int(np.prod(member.shape[1:]))
    with _opened(path, member) as stream:
        for skipped in np.diff(rows, prepend=-1) - 1:
            if skipped:
                stream.seek(int(skipped) * size, os.SEEK_CUR)
            image = stream.read(size)
            if len(image) < size:
                raise EOFError("it is cut short")
            yield np.frombuffer(image, np.uint8).reshape(member.shape[1:])


@contextlib.contextmanager
def _opened(path: Path, member: Member) -> Iterator[IO[bytes]]:
    """A stream that stands at the member's first element. Raises DataError for what goes wrong inside."""
    try:
        with zipfile.ZipFile(path) as file, file.open(member.name) as stream:
            stream.read(member.start)
            yield stream
    except UNREADABLE as error:
        raise unreadable(path, error) from None
