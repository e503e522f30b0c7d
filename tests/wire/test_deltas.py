"""Differences as bytes: what is lost is known to the bit, and what is no file of ours is refused before it takes memory."""

from __future__ import annotations

import struct
import subprocess
import sys
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwfed.errors import InvalidPayload
from lwfed.wire.deltas import MAGIC, decode, encode
from lwfed.wire.sizes import largest_bytes, raw_bytes

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = {"blocks.0.w": (3, 4), "conv.w": (2, 3, 2, 2), "norm.b": (5,), "row.w": (1, 7), "scalar": (), "bn1.running_var": (3,)}
CODECS = ("int8", "bf16")
STEP = np.float32(2.0**-149)  # the least that float32 can say

codecs = st.sampled_from(CODECS)


@st.composite
def differences(draw):
    """Of any number of dimensions, alike or of all sizes that float32 has without its last digits falling away."""
    names = st.sampled_from(["a", "b", "b.running_mean", "c.running_var", "d"])
    shapes = draw(st.dictionaries(names, st.lists(st.integers(1, 4), max_size=4).map(tuple), max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    reach = draw(st.sampled_from([0, 2, 30]))
    return {
        name: np.asarray(random.standard_normal(shape) * 10 ** random.uniform(-reach, reach, shape), np.float32)
        for name, shape in shapes.items()
    }


def some(seed=0, scale=0.01, of=SHAPES):
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.standard_normal(shape) * scale, np.float32) for name, shape in of.items()}


def of(tensors):
    return {name: np.shape(tensor) for name, tensor in tensors.items()}


def sent(deltas, codec, top_k=1.0, seed=1):
    """What the other side reads, and what is lost."""
    encoded = encode(deltas, codec, top_k, seed)
    found = decode(encoded.data, of(deltas), codec)
    assert all(found[name].tobytes() == encoded.sent(name).tobytes() for name in deltas)
    return found, encoded.residual


def file(raw: bytes) -> bytes:
    return MAGIC + zstd.compress(raw, 1)


def raw_of(data: bytes) -> bytes:
    return zstd.decompress(data[len(MAGIC) :])


def step_of(tensor, codec):
    """How far a rounded number may lie from its own: a step of its row, or half of the last of 8 bits."""
    if codec == "bf16" or tensor.ndim < 2:
        return np.abs(tensor) * np.float32(2.0**-8) + np.float32(2.0**-133)
    rows = np.abs(tensor).reshape(len(tensor), -1).max(axis=1)
    return (rows / np.float32(63) * np.float32(1 + 2.0**-20) + 128 * STEP).reshape(-1, *[1] * (tensor.ndim - 1)) + 0 * tensor


@given(differences(), codecs, st.integers(0, 2**63))
def test_what_is_decoded_and_what_is_lost_make_up_what_was_given(deltas, codec, seed):
    """To the bit, but for what is less than half a step of its row and was rounded away from zero: there to 24 bits of the step."""
    encoded = encode(deltas, codec, 1.0, seed)
    data, residual = encoded.data, encoded.residual
    found = decode(data, of(deltas), codec)
    assert residual.keys() == deltas.keys()
    assert len(data) <= largest_bytes(of(deltas), codec)
    assert len(raw_of(data)) == raw_bytes(of(deltas), codec)
    for name, delta in deltas.items():
        assert found[name].dtype == residual[name].dtype == np.float32
        assert found[name].shape == delta.shape
        assert found[name].tobytes() == encoded.sent(name).tobytes()
        assert np.array_equal(residual[name], delta - found[name])
        whole, step = found[name] + residual[name], step_of(delta, codec)
        assert (np.abs(found[name] - delta) <= step).all()
        assert (np.abs(whole - delta) <= step * np.float32(2.0**-24)).all()
        assert np.array_equal(whole[np.abs(delta) > step / 2], delta[np.abs(delta) > step / 2])
        assert np.array_equal(whole[found[name] == 0], delta[found[name] == 0])


def test_what_zstd_cannot_compress_stays_below_the_limit():
    noise = np.random.default_rng(0).bytes(300_000)
    assert len(file(noise)) <= largest_bytes({"w": (150_000,)}, "bf16")


def test_rounding_is_unbiased():
    """The mean over n seeds lies within 5 standard errors; a rounding's deviation is half a step at most."""
    delta, count = {"w": np.array([[1.0, 0.3, -0.301, 0.0001, -0.77, 0.0]], np.float32)}, 1000
    mean = np.mean([sent(delta, "int8", seed=seed)[0]["w"] for seed in range(count)], axis=0, dtype=np.float64)
    assert np.abs(mean - delta["w"]).max() < 5 * (0.5 / 63) / sqrt(count)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("top_k", [1.0, 0.01])
def test_running_statistics_are_sent_as_they_are(codec, top_k):
    deltas = some(of={"bn1.running_mean": (100,), "bn1.running_var": (100,), "bn1.weight": (100,)})
    found, residual = sent(deltas, codec, top_k)
    for name in ("bn1.running_mean", "bn1.running_var"):
        assert np.array_equal(found[name], deltas[name])
        assert not residual[name].any()
    assert residual["bn1.weight"].any()


def test_the_seed_alone_decides_on_the_bytes():
    data = encode(some(), "int8", 1.0, 7).data
    assert encode(dict(reversed(some().items())), "int8", 1.0, 7).data == data
    assert encode({name: np.asfortranarray(tensor) for name, tensor in some().items()}, "int8", 1.0, 7).data == data
    assert encode(some(), "int8", 1.0, 8).data != data
    assert encode(some(), "bf16", 1.0, 8).data == encode(some(), "bf16", 1.0, 7).data


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_and_zeros_are_sent_too(codec):
    assert sent({}, codec) == ({}, {})
    found, residual = sent({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, codec)
    assert not any(tensor.any() for tensors in (found, residual) for tensor in tensors.values())
    with_zero_row = {"w": np.array([[0, 0], [1, -2]], np.float32)}
    assert np.array_equal(sent(with_zero_row, codec)[0]["w"][0], [0, 0])


@pytest.mark.parametrize("codec", CODECS)
def test_a_row_of_one_number_and_powers_of_two_lose_nothing(codec):
    exact = {"w": np.array([[3.0], [-0.25], [0.0]], np.float32), "b": np.array([0.5, -2.0], np.float32), "s": np.array(8.0, np.float32)}
    found, residual = sent({"b": exact["b"], "s": exact["s"]}, codec)
    assert np.array_equal(found["b"], exact["b"])
    assert np.array_equal(found["s"], exact["s"])
    assert not residual["b"].any()
    assert np.abs(sent(exact, codec)[1]["w"]).max() <= 3 * 2.0**-24


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12), st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.99, 1.0]), codecs)
def test_of_every_tensor_only_the_largest_are_sent(values, share, codec):
    delta = np.array(values, np.float32).reshape(1, -1)
    kept = len(values) if share == 1 else max(1, round(share * len(values)))
    chosen = sorted(range(len(values)), key=lambda place: -abs(values[place]))[:kept]  # of equal ones the first
    found, residual = sent({"w": delta}, codec, share)
    others = sorted(set(range(len(values))) - set(chosen))
    assert not found["w"][0, others].any()
    assert np.array_equal(residual["w"][0, others], delta[0, others])
    assert (np.abs(found["w"] - delta)[0, chosen] <= step_of(delta, codec)[0, chosen]).all()


@pytest.mark.parametrize(("codec", "top_k"), [("int8", 1.0), ("int8", 0.25), ("bf16", 1.0), ("bf16", 0.25)])
def test_with_error_feedback_what_was_sent_follows_what_was_to_be_sent(codec, top_k):
    """Over 60 rounds the sums differ by the last residual alone, which does not grow."""
    total, arrived, sizes = some(scale=0), some(scale=0), []
    residual = some(scale=0)
    for round in range(60):
        change = some(seed=round)
        found, residual = sent({name: change[name] + residual[name] for name in change}, codec, top_k, seed=round)
        for name in change:
            total[name], arrived[name] = total[name] + change[name], arrived[name] + found[name]
        sizes.append(max(float(np.abs(tensor).max()) for tensor in residual.values()))
    for name in total:
        assert np.allclose(total[name] - arrived[name], residual[name], atol=1e-6)
    assert max(sizes[30:]) < 1.5 * max(sizes[:30])
    if top_k == 1:
        assert max(sizes) < 0.05 / 63 * 1.2


@pytest.mark.parametrize("codec", CODECS)
def test_differences_are_written_and_read_as_ever(codec):
    """Golden are the bytes before compression, which is another zstd's own affair, and what any zstd makes of the file."""
    golden = (GOLDEN / f"deltas-{codec}.bin").read_bytes()
    encoded = encode(some(), codec, 1.0, 7)
    assert raw_of(encoded.data) == raw_of(golden)
    found = decode(golden, SHAPES, codec)
    assert all(np.array_equal(found[name], some()[name] - encoded.residual[name]) for name in ("norm.b", "scalar", "bn1.running_var"))
    assert all((np.abs(found[name] - some()[name]) <= step_of(some()[name], codec)).all() for name in SHAPES)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_sent(codec, name, value):
    spoilt = some()
    spoilt[name] = np.full(SHAPES[name], value, np.float32)
    with pytest.raises(ValueError, match=f"tensor {name} is not finite, or too large"):
        encode(spoilt, codec, 1.0, 1)


@pytest.mark.parametrize("shape", [(2,), (), (1, 2)])
def test_what_does_not_fit_into_a_bfloat16_is_not_sent(shape):
    with pytest.raises(ValueError, match="too large"):
        encode({"b": np.full(shape, np.finfo(np.float32).max)}, "bf16", 1.0, 1)


ONE_ROW = struct.pack("<f", 1.0) + bytes([1, 255])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins otherwise"),
        (b"LWD", "begins otherwise"),
        (b"LWD2" + zstd.compress(ONE_ROW), "begins otherwise"),
        (MAGIC, "do not fill the 6 bytes"),
        (MAGIC + b"junk", "not a file of differences"),
        (file(ONE_ROW)[:-1], "do not fill the 6 bytes"),
        (file(ONE_ROW)[:-3], "do not fill the 6 bytes"),
        (file(ONE_ROW) + b"x", "do not fill the 6 bytes"),
        (file(ONE_ROW) + zstd.compress(b""), "do not fill the 6 bytes"),
        (file(ONE_ROW[:3]) + zstd.compress(ONE_ROW[3:]), "do not fill the 6 bytes"),
        (file(ONE_ROW + b"\0"), "do not fill the 6 bytes"),
        (file(ONE_ROW[:-1]), "do not fill the 6 bytes"),
        (file(b""), "do not fill the 6 bytes"),
        (file(struct.pack("<f", np.nan) + bytes(2)), "w holds values that are not finite"),
        (file(struct.pack("<f", np.inf) + bytes(2)), "w holds values that are not finite"),
        (file(struct.pack("<f", -np.inf) + bytes([0, 1])), "w holds values that are not finite"),
        (file(struct.pack("<f", 3e38) + bytes([0, 127])), "w holds values that are not finite"),
    ],
)
def test_what_is_no_file_of_these_tensors_is_refused(data, message):
    assert np.array_equal(decode(file(ONE_ROW), {"w": (1, 2)}, "int8")["w"], [[1, -1]])
    with pytest.raises(InvalidPayload, match=message):
        decode(data, {"w": (1, 2)}, "int8")


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
def test_a_bfloat16_that_is_not_finite_is_refused(bits):
    with pytest.raises(InvalidPayload, match="b holds values that are not finite"):
        decode(file(struct.pack("<2H", 0, bits)), {"b": (2,)}, "bf16")


@pytest.mark.parametrize("other", [{"w": (1, 3)}, {"w": (2, 2)}, {"w": (6,)}, {}, {"w": (1, 2), "x": (1,)}])
def test_other_shapes_are_refused(other):
    with pytest.raises(InvalidPayload, match="do not fill"):
        decode(file(ONE_ROW), other, "int8")


BOMB = """
import resource, sys
from pathlib import Path
from lwfed.errors import InvalidPayload
from lwfed.wire.deltas import decode
data, before = Path(sys.argv[1]).read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(data, {"w": (1, 2)}, "int8")
except InvalidPayload:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_bomb_is_refused_without_its_memory(tmp_path):
    """A gigabyte of zeros is 33 kB here. In a process of its own, whose peak nothing has raised before."""
    compressor = zstd.ZstdCompressor(1)
    piece = bytes(1 << 20)
    bomb = b"".join([MAGIC, *(compressor.compress(piece) for _ in range(1024)), compressor.flush()])
    assert len(bomb) < 40_000
    (tmp_path / "bomb").write_bytes(bomb)
    done = subprocess.run([sys.executable, "-c", BOMB, tmp_path / "bomb"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8
