"""Sizes told from shapes: no file of such tensors has more bytes, whatever their numbers are."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwfed.errors import InvalidPayload
from lwfed.wire import deltas, tensors
from lwfed.wire.sizes import largest_bytes, packed_bytes, stated_shapes

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(lambda name: name != "__metadata__")
SHAPES = st.dictionaries(NAMES, st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=4)
DRAWS = {
    "noise": lambda random, count: random.standard_normal(count),
    "even": lambda random, count: random.uniform(-1, 1, count),
    "bits": lambda random, count: random.integers(0, 1 << 16, count, np.uint32) << 16,  # of a bfloat16: nothing compresses them
    "zeros": lambda random, count: np.zeros(count),
}


def drawn(shapes, kind, seed):
    random = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        numbers = DRAWS[kind](random, int(np.prod(shape)))
        numbers = np.float32(numbers) if kind != "bits" else numbers.astype("<u4").view("<f4")
        found[name] = np.where(np.abs(numbers) < 1e37, numbers, 0).astype(np.float32).reshape(shape)
    return found


@given(SHAPES, st.sampled_from(sorted(DRAWS)), st.integers(0, 2**32))
def test_nothing_that_is_encoded_is_larger_than_was_reckoned(shapes, kind, seed):
    found = drawn(shapes, kind, seed)
    assert len(tensors.encode(found)) <= largest_bytes(shapes, "fp32")
    rows = {name: shape for name, shape in shapes.items() if 0 not in shape}
    for codec in ("int8", "bf16"):
        for top_k in (1.0, 0.3):
            data = deltas.encode({name: found[name] for name in rows}, codec, top_k, seed).data
            assert len(data) <= largest_bytes(rows, codec)


@pytest.mark.parametrize(("codec", "kind"), [("fp32", "noise"), ("int8", "even"), ("bf16", "bits")])
@pytest.mark.parametrize("shapes", [{"w": (400, 2000)}, {f"blocks.{number}.w": (30, 30) for number in range(300)}], ids=["large", "many"])
def test_what_nothing_compresses_comes_near_to_what_was_reckoned(codec, kind, shapes):
    """int8 leaves out one bit of eight."""
    found = drawn(shapes, kind, 1)
    size = len(tensors.encode(found) if codec == "fp32" else deltas.encode(found, codec, 1.0, 1).data)
    assert (0.85 if codec == "int8" else 0.96) * largest_bytes(shapes, codec) < size <= largest_bytes(shapes, codec)


def test_what_the_codecs_promise():
    shapes = {"w": (192, 768), "b": (192,)}
    whole = largest_bytes(shapes, "fp32")
    assert whole / largest_bytes(shapes, "bf16") == pytest.approx(2, rel=0.02)
    assert whole / largest_bytes(shapes, "int8") == pytest.approx(4, rel=0.04)
    assert packed_bytes(shapes, "int8") < largest_bytes(shapes, "int8")


@given(SHAPES)
def test_shapes_are_read_as_they_were_written(tmp_path_factory, shapes):
    path = tmp_path_factory.getbasetemp() / "part"
    path.write_bytes(tensors.encode({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}))
    found = stated_shapes(path)
    assert found == shapes
    assert list(found) == sorted(shapes)


def stated(**changes):
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}


def file(header, body=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"", b"1234567", file(b""), file(b"[]"), file(b"nonsense"), file(b"[" * 100_000), file({"w": None}), file({"w": {}}),
        file(stated(shape=[-2, -3])), file(stated(shape=[2.5, 3])), file(stated(shape=[10**400, 0])), file(stated(shape=None)),
        file(stated(shape=[2, 4])), file(stated(shape=[])), file(stated(dtype="F64")), file(stated(more=1)), file(stated(), bytes(23)),
        struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 1 << 21) + b" " * (1 << 21),
    ],
)  # fmt: skip
def test_a_file_that_states_no_shapes_is_refused(tmp_path, data):
    (tmp_path / "part").write_bytes(file(stated()))
    assert stated_shapes(tmp_path / "part") == {"w": (2, 3)}
    (tmp_path / "part").write_bytes(data)
    with pytest.raises(InvalidPayload, match="not a safetensors file of float32 numbers"):
        stated_shapes(tmp_path / "part")


def test_reckoning_takes_no_numpy():
    """An agent's control process does it."""
    code = "import sys, lwfed.edge_agent.agent, lwfed.wire.sizes; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
