"""What an .npz file of images holds, read from its headers: no pixels, no pickles, and without numpy.

The layout is MedMNIST's (Yang et al., arXiv 2110.14795): train_images, val_images and test_images, each [N, H, W] or
[N, H, W, 3] of uint8, with labels [N] or [N, 1] of integers beside them.
"""

from __future__ import annotations

import ast
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lwfed.errors import DataError

READ = {f"{part}_{kind}.npy" for part in ("train", "val", "test") for kind in ("images", "labels")}
MAX_IMAGES = 10_000_000  # of a member; their labels are held in memory
MAX_IMAGE_BYTES = 2**26  # of one decoded image, e.g. 4729 x 4729 in colour
MAX_HEADER_BYTES = 4096  # numpy writes 128 for arrays like these
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)  # encrypted: RuntimeError


@dataclass(frozen=True)
class Member:
    """One array of the file."""

    name: str  # in the zip
    shape: tuple[int, ...]
    dtype: str  # numpy's notation: |u1, <i8
    start: int  # bytes before its first element

    @property
    def count(self) -> int:
        return self.shape[0] if self.shape else 0


@dataclass(frozen=True)
class Part:
    """The images of one or more members, one after the other, and their labels."""

    images: tuple[Member, ...]
    labels: tuple[Member, ...]  # empty without one class per image ...
    unlabelled: str  # ... and this is why

    @property
    def count(self) -> int:
        return sum(member.count for member in self.images)


@dataclass(frozen=True)
class Archive:
    path: Path
    train: Part  # train and val
    test: Part | None  # None unless it has labels: there is nothing else to test by


def open_archive(path: Path) -> Archive:
    """Raises DataError when the file is none of these, or its arrays have other shapes or types."""
    try:
        with zipfile.ZipFile(path) as file:
            names = set(file.namelist())
            if "train_images.npy" not in names:
                held = ", ".join(sorted(name.removesuffix(".npy") for name in names)[:10]) or "nothing"
                raise DataError(
                    f"{str(path)!r} has no array train_images, but {held}: name the arrays as MedMNIST does, train_images first"
                )
            members = {name: _member(path, file, name) for name in sorted(names & READ)}
    except UNREADABLE as error:
        raise unreadable(path, error) from None
    test = _part(path, members, ["test"])
    return Archive(path, _part(path, members, ["train", "val"]), test if test.labels else None)


def unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{str(path)!r} cannot be read as an .npz file ({error}): is it complete, and written by numpy.savez?")


def _part(path: Path, members: dict[str, Member], parts: list[str]) -> Part:
    images, labels, why = [], [], ""
    for part in parts:
        found = members.get(f"{part}_images.npy")
        if found is None:
            continue
        _require_images(path, found)
        images.append(found)
        beside = members.get(f"{part}_labels.npy")
        why = why or _objection(part, beside, found.count)
        labels += [beside] if beside else []
    return Part(tuple(images), () if why else tuple(labels), why)


def _require_images(path: Path, member: Member) -> None:
    array = f"{str(path)!r}: {_plain(member)} is {_dtype(member)} {list(member.shape)}"
    grey_or_colour = len(member.shape) == 3 or (len(member.shape) == 4 and member.shape[3] == 3)
    if member.dtype != "|u1" or not grey_or_colour:
        raise DataError(f"{array}; images are uint8 [N, height, width] or [N, height, width, 3]")
    if not (0 < member.count <= MAX_IMAGES and 0 < math.prod(member.shape[1:]) <= MAX_IMAGE_BYTES):
        raise DataError(f"{array}; it takes 1 to {MAX_IMAGES} images of at most {MAX_IMAGE_BYTES} bytes each")


def _objection(part: str, labels: Member | None, count: int) -> str:
    """Why these are not one class per image; empty if they are."""
    if labels is None:
        return f"it has no {part}_labels"
    if labels.shape not in ((count,), (count, 1)):
        return f"its {part}_labels are {list(labels.shape)}, not one for each of {count} images"
    return "" if labels.dtype[1:2] in "iu" else f"its {part}_labels are {_dtype(labels)}, no integers"


def _plain(member: Member) -> str:
    return member.name.removesuffix(".npy")


def _dtype(member: Member) -> str:
    return "uint8" if member.dtype == "|u1" else member.dtype


def _member(path: Path, file: zipfile.ZipFile, name: str) -> Member:
    """The header of an .npy file (numpy's NEP 1) and whether the zip holds as many bytes as it says."""
    with file.open(name) as stream:
        member, in_rows = _header(stream, name)
    width = int(member.dtype[2:]) if member.dtype[2:].isdecimal() else 0
    if not in_rows and len(member.shape) > 1:
        raise DataError(f"{str(path)!r}: {_plain(member)} is stored by columns: save numpy.ascontiguousarray of it")
    if member.start + width * math.prod(member.shape) != file.getinfo(name).file_size:
        raise DataError(f"{str(path)!r}: {_plain(member)} is not the plain array {_dtype(member)} {list(member.shape)} that it says it is")
    return member


def _header(stream: IO[bytes], name: str) -> tuple[Member, bool]:
    """Raises ValueError for anything but a header."""
    magic, major, _ = struct.unpack("<6sBB", _exactly(stream, 8))
    if magic != b"\x93NUMPY":
        raise ValueError(f"{name} is no array")
    sized, form = (2, "<H") if major == 1 else (4, "<I")
    (length,) = struct.unpack(form, _exactly(stream, sized))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"the header of {name} has {length} bytes")
    try:
        header = ast.literal_eval(_exactly(stream, length).decode("latin-1").strip())
        shape, dtype, by_columns = header["shape"], header["descr"], header["fortran_order"]
        plain = all(isinstance(size, int) and size >= 0 for size in shape)
    except (SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise ValueError(f"the header of {name} is broken") from None
    if not plain:
        raise ValueError(f"the header of {name} gives the shape {shape}")
    return Member(name, tuple(shape), str(dtype), 8 + sized + length), not by_columns


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("it is cut short")
    return data
