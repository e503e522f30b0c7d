"""How many bytes tensors take as files, by their names and shapes alone. Without numpy, for an agent's control process reckons too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from lwfed import disk
from lwfed.errors import InvalidPayload
from lwfed.plan import STATISTICS
from lwfed.wire.messages import MAX_BLOB_BYTES
from lwfed.wire.records import Record

Codec = Literal["int8", "bf16", "fp32"]
Form = Literal["single", "half", "byte"]  # of the differences of a tensor: float32, bfloat16, int8
FORMS: tuple[Form, ...] = get_args(Form)
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

MAX_HEADER_BYTES = 1 << 20  # of a safetensors file: 150 a tensor, hence 7,000 tensors; ViT-Large has 300
LENGTH_BYTES = 8  # before the header, which is filled up to a multiple of it
FRAME_BYTES = 64  # that a file of differences has beside its blocks: "LWD1" and the head of a zstd frame take less than half


class _Stated(Record):
    dtype: Literal["F32"]
    shape: tuple[Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)], ...]
    data_offsets: tuple[int, int]


_HEADER = TypeAdapter(dict[str, _Stated])


def stated_shapes(path: Path) -> dict[str, Shape]:
    """Names and shapes by the header of a safetensors file, in the order of names.

    Raises InvalidPayload unless float32 numbers fill it, and StateError where it cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = file.read(min(length, MAX_HEADER_BYTES))
    except OSError as error:
        raise disk.unusable(f"cannot read {path}: {error.strerror or error}; check the disk", error) from None
    try:
        shapes = {name: stated.shape for name, stated in sorted(_HEADER.validate_json(header).items())}
    except ValidationError:
        raise InvalidPayload("not a safetensors file of float32 numbers: its header cannot be read") from None
    if LENGTH_BYTES + length + 4 * numbers(shapes) != size:
        raise InvalidPayload("not a safetensors file of float32 numbers: its header and its length differ")
    return shapes


def largest_bytes(shapes: Shapes, codec: Codec) -> int:
    """No update or change of these tensors has more in `codec`, whatever their numbers are."""
    if codec == "fp32":
        data = 4 * numbers(shapes)
        header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [data, data]} for name, shape in shapes.items()}
        return 2 * LENGTH_BYTES + len(json.dumps(header)) + data
    raw = raw_bytes(shapes, codec)
    return FRAME_BYTES + raw + raw // 128  # what zstd cannot compress it keeps as it is, with 3 bytes for every 128 KiB


def packed_bytes(shapes: Shapes, codec: Codec) -> int:
    """About what a file of differences has whose numbers are all equally frequent: 7 bits a step, of a byte's 256 values 127 occur."""
    steps = counts_of(shapes, codec)[1]["byte"]
    return raw_bytes(shapes, codec) - steps + steps * 7 // 8


def raw_bytes(shapes: Shapes, codec: Codec) -> int:
    """Of differences before compression."""
    scales, counts = counts_of(shapes, codec)
    return 4 * (scales + counts["single"]) + 2 * counts["half"] + counts["byte"]


def counts_of(shapes: Shapes, codec: Codec) -> tuple[int, dict[Form, int]]:
    """Of differences: how many scales, and numbers of each form."""
    scales, counts = 0, dict.fromkeys(FORMS, 0)
    for name, shape in shapes.items():
        form = form_of(name, shape, codec)
        scales += shape[0] if form == "byte" else 0
        counts[form] += prod(shape)
    return scales, counts


def form_of(name: str, shape: Shape, codec: Codec) -> Form:
    """How the differences of a tensor travel."""
    if name.endswith(STATISTICS):
        return "single"
    return "byte" if codec == "int8" and len(shape) > 1 else "half"


def numbers(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())
