from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.errors import InvalidPayload
from lwfed.wire.tensors import decode, encode, iterate, read

SHAPES = {"blocks.0.w": (3, 2), "norm.b": (4,), "scalar": ()}


def some(shapes=SHAPES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: np.asarray(random.standard_normal(shape), dtype=np.float32) for name, shape in shapes.items()}


def raw(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture(params=["bytes", "file"])
def source(request, tmp_path):
    def give(data: bytes):
        if request.param == "bytes":
            return data
        (tmp_path / "x").write_bytes(data)
        return tmp_path / "x"

    return give


def test_what_is_written_is_read(source):
    tensors = some()
    found = decode(source(encode(tensors)), SHAPES)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) and found[name].shape == SHAPES[name] for name in SHAPES)


def test_a_file_of_our_own_is_read_in_the_shapes_that_it_states(tmp_path):
    tensors = some()
    (tmp_path / "x").write_bytes(encode(tensors))
    found = read(tmp_path / "x")
    assert list(found) == sorted(tensors)
    assert all(np.array_equal(found[name], tensors[name]) and found[name].shape == SHAPES[name] for name in SHAPES)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        raw({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0\0\xc0\x7f"),
        raw({"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        encode(some())[:-1],
    ],
)
def test_one_that_the_disk_has_spoilt_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(InvalidPayload):
        read(tmp_path / "x")


def test_order_and_layout_in_memory_change_nothing():
    tensors = some()
    other = {name: tensors[name] for name in reversed(tensors)}
    other["blocks.0.w"] = np.asfortranarray(other["blocks.0.w"])
    assert encode(other) == encode(tensors)


def test_only_float32_is_written():
    with pytest.raises(ValueError, match="w is float64"):
        encode({"w": np.zeros(2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.b"), "lacks 1 of 3 tensors: 'norm.b'"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "unexpected 1 of 3 tensors: 'extra'"),
        (lambda t: t.update({"norm.b": np.zeros((2, 2), np.float32)}), r"norm.b has shape \(2, 2\), not \(4,\)"),
        (lambda t: t["norm.b"].__setitem__(1, np.nan), "norm.b holds values that are not finite"),
        (lambda t: t["norm.b"].__setitem__(1, -np.inf), "norm.b holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_the_plan_are_named(source, change, message):
    tensors = some()
    change(tensors)
    with pytest.raises(InvalidPayload, match=message):
        decode(source(encode(tensors)), SHAPES)


def test_another_dtype_is_refused(source):
    data = raw({"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8))
    with pytest.raises(InvalidPayload, match="w is F64, not F32"):
        decode(source(data), {"w": (1,)})


def test_an_update_is_checked_one_tensor_at_a_time(tmp_path):
    (tmp_path / "update").write_bytes(encode(some()))
    assert [name for name, _ in iterate(tmp_path / "update", SHAPES)] == sorted(SHAPES)
    with pytest.raises(InvalidPayload):
        list(iterate(tmp_path / "update", {}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 100 << 20) + b"{}",
        raw(b"{"),
        raw({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, bytes(4)),
        raw({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        raw({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        raw({"w": {"dtype": "NONE", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        raw({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(400)),
    ],
)
def test_malformed_files_are_refused(source, data):
    with pytest.raises(InvalidPayload, match="not a safetensors file"):
        decode(source(data), {"w": (1,)})


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_refused_or_harmless(data):
    """Never another exception, and never anything but finite float32 tensors of the expected shapes."""
    whole = bytearray(encode(some()))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=5)):
        whole[place] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = decode(damaged, SHAPES)
    except InvalidPayload:
        return
    assert {name: tensor.shape for name, tensor in found.items()} == SHAPES
    assert all(np.isfinite(tensor).all() for tensor in found.values())
