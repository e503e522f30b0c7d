"""Named float32 tensors as bytes: the safetensors format, read only under the shapes that the plan expects.

The format is safe to parse but says nothing about sense: flipped bits, NaN and wrong shapes pass. They are checked here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from lwfed.errors import InvalidPayload, NotFinite
from lwfed.wire.sizes import LENGTH_BYTES, MAX_HEADER_BYTES, Shapes

Array = np.ndarray[Any, np.dtype[np.float32]]


def encode(tensors: Mapping[str, Array]) -> bytes:
    """The same tensors give the same bytes on every machine. Raises ValueError for a dtype other than float32."""
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise ValueError(f"tensor {name} is {tensor.dtype}, not float32")
    return save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)})


def decode(source: bytes | Path, shapes: Shapes) -> dict[str, Array]:
    """Exactly the tensors of `shapes`; raises InvalidPayload naming what is wrong."""
    return dict(iterate(source.read_bytes() if isinstance(source, Path) else source, shapes))


def read(path: Path) -> dict[str, Array]:
    """All tensors of a file of our own, in the shapes that it states; raises InvalidPayload where the disk has spoilt it."""
    data = path.read_bytes()
    _check_header_size(data)
    with _explained():
        found = _pieces(data)
        return dict(_checked(found, {name: tuple(piece["shape"]) for name, piece in found.items()}))


def iterate(source: bytes | Path, shapes: Shapes) -> Iterator[tuple[str, Array]]:
    """The tensors of `shapes` by name, each read and checked when its turn comes; raises InvalidPayload."""
    _check_header_size(source)
    with _explained():
        yield from _from_file(source, shapes) if isinstance(source, Path) else _checked(_pieces(source), shapes)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise InvalidPayload(f"not a safetensors file: {error}") from None


def _from_file(path: Path, shapes: Shapes) -> Iterator[tuple[str, Array]]:
    with safetensors.safe_open(path, framework="numpy") as file:
        names = set(file.keys())
        _check_names(names, shapes)
        for name in sorted(names):
            piece = file.get_slice(name)
            _check_form(name, piece.get_dtype(), tuple(piece.get_shape()), shapes[name])
            yield name, _finite(name, file.get_tensor(name))


def _pieces(data: bytes) -> dict[str, Any]:
    parse: Any = safetensors.deserialize  # without types
    return dict(parse(data))


def _checked(found: Mapping[str, Any], shapes: Shapes) -> Iterator[tuple[str, Array]]:
    _check_names(set(found), shapes)
    for name in sorted(found):
        piece = found[name]
        _check_form(name, piece["dtype"], tuple(piece["shape"]), shapes[name])
        yield name, _finite(name, np.frombuffer(piece["data"], dtype="<f4").reshape(shapes[name]))


def _check_header_size(source: bytes | Path) -> None:
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(LENGTH_BYTES)
    else:
        start = source[:LENGTH_BYTES]
    if len(start) < LENGTH_BYTES or struct.unpack("<Q", start)[0] > MAX_HEADER_BYTES:
        raise InvalidPayload(f"not a safetensors file: its header is cut off or longer than {MAX_HEADER_BYTES} bytes")


def _check_names(found: set[str], shapes: Shapes) -> None:
    for what, names in (("lacks", shapes.keys() - found), ("has unexpected", found - shapes.keys())):
        if names:
            listed = ", ".join(repr(name[:80]) for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise InvalidPayload(f"{what} {len(names)} of {len(shapes)} tensors: {listed}")


def _check_form(name: str, dtype: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if dtype != "F32":
        raise InvalidPayload(f"tensor {name} is {dtype}, not F32")
    if shape != tuple(expected):
        raise InvalidPayload(f"tensor {name} has shape {shape}, not {tuple(expected)}")


def _finite(name: str, tensor: Array) -> Array:
    if not np.isfinite(tensor).all():
        raise NotFinite(f"tensor {name} holds values that are not finite")
    return tensor
