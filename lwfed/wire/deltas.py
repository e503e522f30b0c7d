"""Differences of tensors as few bytes: rounded at random or to bfloat16, and compressed.

    "LWD1"  zstd frame of: scales, float32 [all rows]; singles, float32 [their numbers]; halves, bfloat16 [their numbers];
            bytes, int8 [their numbers]

Names and shapes of the tensors are what both ends know; they follow each other in the order of names. With the codec int8
all but vectors are bytes: each row, what has one index in the first dimension, has a scale, and is rounded at random, so that
the mean of what is decoded is what was sent (QSGD, arXiv 1610.02132). Vectors (biases, norms), which one scale would suit ill,
and everything with the codec bf16 are halves. What encoding loses, the residual, is for the sender to add to its next
difference (error feedback, arXiv 1901.09847). Running statistics of batch norms are singles, all of them and without residual:
a variance that shrinks to a thousandth would come out negative by what a half loses. Decoding gives the same bits on every
machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from mmap import mmap
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.random import Philox

from lwfed.errors import InvalidPayload, NotFinite
from lwfed.plan import STATISTICS
from lwfed.wire.sizes import Form, Shapes, counts_of, form_of
from lwfed.wire.tensors import Array

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Codec = Literal["int8", "bf16"]
DTYPES: Mapping[Form, np.dtype[Any]] = {
    "single": np.dtype("<f4"),
    "half": np.dtype("<u2"),
    "byte": np.dtype("i1"),
}  # as they follow each other
MAGIC = b"LWD1"
LEVEL = 1  # of zstd, whose entropy coding is what gains here: higher ones look for repetitions, and noise has none
LARGEST = 63  # not 127: once compressed it takes an eighth fewer bytes, and what rounding loses is sent later
RANDOM = np.uint16  # random numbers that a rounding takes, one a value


@dataclass(frozen=True)
class Encoded:
    """A file of differences, and the residual of each tensor, float32."""

    data: bytes
    residual: dict[str, Array]
    raw: bytes  # before compression
    layout: Layout

    def sent(self, name: str) -> Array:
        """What decoding gives."""
        return self.layout.read(self.raw, name)


def encode(deltas: Mapping[str, Array], codec: Codec, top_k: float, seed: int) -> Encoded:
    """Of all but statistics only the part `top_k` of the largest differences is sent.

    Raises ValueError for a difference that is not finite or too large for its form.
    """
    kept = {name: deltas[name] if name.endswith(STATISTICS) else _largest(deltas[name], top_k) for name in sorted(deltas)}
    random = _stream(seed)
    scales: list[bytes] = []
    written: dict[Form, list[bytes]] = {form: [] for form in DTYPES}
    for name, tensor in kept.items():
        form = form_of(name, tensor.shape, codec)
        if form == "byte":
            scale, step = _to_int8(tensor, random)
            scales.append(scale.astype("<f4").tobytes())
            written[form].append(step.tobytes())
        else:
            written[form].append(_to_bf16(tensor).tobytes() if form == "half" else tensor.astype("<f4").tobytes())
    raw = b"".join([*scales, *(piece for form in DTYPES for piece in written[form])])
    layout = Layout({name: tensor.shape for name, tensor in kept.items()}, codec)
    with np.errstate(all="ignore"):  # what is not finite is found below
        residual = {name: deltas[name] - layout.read(raw, name) for name in kept}
    for name, tensor in residual.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"the difference of tensor {name} is not finite, or too large")
    return Encoded(MAGIC + zstd.compress(raw, LEVEL), residual, raw, layout)


def decode(data: bytes, shapes: Shapes, codec: Codec) -> dict[str, Array]:
    """What a file holds, float32 by the names of `shapes`. Raises InvalidPayload unless it is exactly of them, and finite."""
    return dict(iterate(data, shapes, codec))


def iterate(data: bytes, shapes: Shapes, codec: Codec) -> Iterator[tuple[str, Array]]:
    """The same, each tensor read and checked when its turn comes."""
    layout = Layout(shapes, codec)
    raw = decompress(data, layout)
    for name in shapes:
        with np.errstate(all="ignore"):  # numpy would warn of what is refused here
            found = layout.read(raw, name)
        if not np.isfinite(found).all():
            raise NotFinite(f"tensor {name} holds values that are not finite")
        yield name, found


def decompress(data: bytes, layout: Layout) -> bytes:
    """What `layout` reads; never many more bytes than that, whatever the file promises. Raises InvalidPayload."""
    if not data.startswith(MAGIC):
        raise InvalidPayload("not a file of differences: it begins otherwise")
    decompressor = zstd.ZstdDecompressor()
    try:
        raw: bytes = decompressor.decompress(data[len(MAGIC) :], max_length=layout.bytes + 1)
    except zstd.ZstdError as error:
        raise InvalidPayload(f"not a file of differences: {error}") from None
    if len(raw) != layout.bytes or not decompressor.eof or decompressor.unused_data:
        raise InvalidPayload(f"its differences do not fill the {layout.bytes} bytes that the tensors of this stage take")
    return raw


class Layout:
    """Where the numbers of each tensor of `shapes` lie in a decompressed file."""

    def __init__(self, shapes: Shapes, codec: Codec) -> None:
        scales, counts = counts_of(shapes, codec)
        starts: dict[Form, int] = {"single": 4 * scales, "half": 4 * (scales + counts["single"])}
        starts["byte"] = starts["half"] + 2 * counts["half"]
        self.bytes = starts["byte"] + counts["byte"]
        row = 0
        self._places: dict[str, tuple[tuple[int, ...], Form, int, int]] = {}  # shape, form, where numbers begin, where scales do
        for name in sorted(shapes):
            shape = tuple(shapes[name])
            form = form_of(name, shape, codec)
            self._places[name] = shape, form, starts[form], 4 * row
            starts[form] += prod(shape) * DTYPES[form].itemsize
            row += shape[0] if form == "byte" else 0

    def read(self, raw: bytes | mmap, name: str, index: tuple[slice, ...] = ()) -> Array:
        """The difference of a tensor, float32, or the block `index` of it; `raw` is the decompressed file."""
        shape, form, start, scales = self._places[name]
        numbers = np.frombuffer(raw, DTYPES[form], prod(shape), start).reshape(shape)[index]
        if form == "byte":
            scale = np.frombuffer(raw, "<f4", shape[0], scales).reshape(-1, *[1] * (len(shape) - 1))[index[:1]]
            return np.asarray(numbers.astype(np.float32) * scale.astype(np.float32))
        singles = (numbers.astype("<u4") << 16).view("<f4") if form == "half" else numbers
        return np.asarray(singles.astype(np.float32))


def _largest(delta: Array, share: float) -> Array:
    """Zeros in place of all but the part `share` of the numbers, those of the largest amount; of equal ones the first."""
    if share >= 1:
        return delta
    flat = np.abs(delta).reshape(-1)
    kept = np.argsort(-flat, kind="stable")[: max(1, round(share * len(flat)))]
    sparse: Array = np.zeros_like(delta)
    sparse.reshape(-1)[kept] = delta.reshape(-1)[kept]
    return sparse


def _to_int8(delta: Array, random: Philox) -> tuple[Array, npt.NDArray[np.int8]]:
    rows = delta.reshape(len(delta), -1)
    with np.errstate(all="ignore"):
        return _rounded(rows, random)


def _rounded(rows: Array, random: Philox) -> tuple[Array, npt.NDArray[np.int8]]:
    scale: Array = np.abs(rows).max(axis=1, initial=0) / np.float32(LARGEST)
    steps = rows / np.where(scale > 0, scale, np.float32(1))[:, None]
    found = np.floor(steps + _uniform(random, rows.size).reshape(rows.shape))
    return scale, np.clip(found, -LARGEST, LARGEST).astype(np.int8)


def _to_bf16(delta: Array) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(delta, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _stream(seed: int) -> Philox:
    """Its raw numbers are promised to stay as they are in all versions of numpy."""
    return Philox(key=seed)


def _uniform(random: Philox, count: int) -> Array:
    """In (0, 1), float32 [count]."""
    raw: npt.NDArray[np.uint64] = random.random_raw(-(-count * RANDOM().itemsize // 8))
    drawn = raw.astype("<u8").view("<u2")[:count]
    uniform: Array = (drawn.astype(np.float32) + np.float32(0.5)) / np.float32(65536)
    return uniform
