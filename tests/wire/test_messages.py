from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwfed.errors import InvalidMessage, ProtocolMismatch
from lwfed.transport.packets import matches
from lwfed.wire.enrolment import Admission, Enrol
from lwfed.wire.messages import (
    DOWN,
    MAX_GRAPH_BYTES,
    MAX_MESSAGE_BYTES,
    UP,
    BlobRef,
    Done,
    Manifest,
    Run,
    ServerState,
    decode,
    decode_server_state,
    encode,
)
from lwfed.wire.ranges import indices, ranges
from lwfed.wire.topics import Topics

from .samples import SAMPLES

MODELS = [*{**UP, **DOWN}.values(), Run, ServerState, Enrol, Admission]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(MODELS), st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_junk_is_an_invalid_message_and_nothing_else(model, payload):
    try:
        decode(model, payload)
    except (InvalidMessage, ProtocolMismatch):
        return
    assert model is ServerState or json.loads(payload)


@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_a_damaged_message_is_invalid_or_still_one(name, data):
    whole = bytearray(encode(SAMPLES[name]))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    try:
        message = decode(type(SAMPLES[name]), bytes(whole))
    except (InvalidMessage, ProtocolMismatch):
        return
    assert decode(type(message), encode(message)) == message


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_junk_state_of_the_server_is_invalid(payload):
    try:
        state = decode_server_state(payload)
    except InvalidMessage:
        return
    assert decode_server_state(encode(state)) == state


@pytest.mark.parametrize("model", MODELS)
def test_too_long_is_refused_before_it_is_parsed(model):
    with pytest.raises(InvalidMessage, match="exceeds"):
        decode(model, b"1" * (MAX_MESSAGE_BYTES + 1))


@pytest.mark.parametrize(("engine", "size", "problem"), [("onnx", MAX_GRAPH_BYTES + 1, "exceeds"), ("torch", 2000, "graphs")])
def test_a_graph_is_small_and_of_an_engine_that_needs_one(engine, size, problem):
    run = json.loads(encode(SAMPLES["run"]))
    run["graphs"] = {engine: {"id": "56" * 32, "size": size}}
    with pytest.raises(InvalidMessage, match=problem):
        decode(Run, json.dumps(run).encode())


def test_depth_is_refused():
    with pytest.raises(InvalidMessage):
        decode(Run, b"[" * 100_000)


@pytest.mark.parametrize("version", ["-1", "0", "true", "false", "1.0", "1.5", "1e400", '"1"', "null", "[1]", "9" * 4000, "9" * 5000])
def test_what_is_no_version_makes_a_message_invalid(version):
    with pytest.raises(InvalidMessage) as refusal:
        decode(Done, f'{{"v": {version}, "contribution": "a"}}'.encode())
    assert len(str(refusal.value)) < 100


@pytest.mark.parametrize("version", ["-1", "0", "true", "1.5", "1e400", '"1"', "null", "9" * 4000, "9" * 5000])
def test_what_is_no_version_makes_a_state_of_the_server_invalid(version):
    with pytest.raises(InvalidMessage):
        decode_server_state(f'{{"online": true, "epoch": 1, "protocol_max": {version}}}'.encode())


def test_another_version_is_told_apart():
    payload = json.dumps({"v": 2, "future": True}).encode()
    with pytest.raises(ProtocolMismatch, match="pip install"):
        decode(Run, payload)


@given(st.sets(st.integers(0, 1199)))
def test_ranges_and_indices_are_inverse(chosen):
    assert indices(ranges(list(chosen)), 1200) == sorted(chosen)


def test_the_worst_ranges_of_a_blob_fit_their_field():
    assert len(ranges(list(range(0, 1200, 2)))) < 8192


@given(st.text(alphabet="0123456789,-", max_size=40))
def test_ranges_out_of_bounds_never_grow(text):
    try:
        found = indices(text, 50)
    except (InvalidMessage, ValueError):
        return
    assert all(0 <= index < 50 for index in found)


@pytest.mark.parametrize("text", ["0-49,0-49", "3,3", "5,4", "0-9,9-12"])
def test_ranges_name_no_chunk_twice(text):
    """Or a few bytes would stand for as much work as somebody likes."""
    with pytest.raises(InvalidMessage, match="chunks"):
        indices(text, 50)


def test_a_manifest_must_cover_its_blob():
    good = SAMPLES["manifest"]
    assert isinstance(good, Manifest)
    payload = encode(good.model_copy(update={"blob": BlobRef(id=good.blob.id, size=4000)}))
    with pytest.raises(InvalidMessage, match="3 digests for 4000 bytes"):
        decode(Manifest, payload)


@given(st.text(max_size=60) | st.lists(st.sampled_from(["lwfed", "f", "d", "up", "dn", "blob", "+", "#", "", "0", "a"])).map("/".join))
def test_topics_that_nobody_built_parse_to_nothing_or_round_trip(text):
    topic = Topics("f").parse(text)
    assert topic is None or text.startswith("lwfed/f/")


@pytest.mark.parametrize(
    "fields", [{}, {"device": "porch"}, {"certificate": "pem"}, {"device": "porch", "certificate": "pem", "refused": "no"}]
)
def test_an_admission_says_one_thing(fields):
    with pytest.raises(InvalidMessage, match="nor a reason"):
        decode(Admission, json.dumps(fields).encode())


def test_a_secret_is_not_shown_by_accident():
    assert "s3cr3t" not in repr(SAMPLES["enrol"])


def test_what_a_server_says_to_itself_comes_to_it_and_no_device_can_say_it():
    topics = Topics("default")
    assert matches(topics.from_all_devices, topics.echo)
    assert "." not in topics.echo
    assert topics.parse(topics.echo) is None
