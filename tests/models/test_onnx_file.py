"""No graph but that of a layer gets to ONNX Runtime, whatever the bytes from the server are."""

import copy
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.errors import InvalidPayload
from lwfed.models import prefix
from lwfed.models.backbones import load_encoder
from lwfed.models.initial import init_parts
from lwfed.models.onnx_file import read, write
from lwfed.models.onnx_layer import layer_graph
from lwfed.models.vit import EPS, Block
from lwfed.wire.messages import MAX_GRAPH_BYTES

from ..wire.decoders import mutated

GOLDEN = {
    engine: Path(__file__).parents[1] / "golden" / f"layer-{engine.replace('_', '-')}.onnx" for engine in ("onnx", "onnx_int8")
}  # of width 16 with 2 heads


def graph(engine):
    return layer_graph(16, 2, 64, EPS, engine == "onnx_int8")


@pytest.fixture(params=GOLDEN)
def engine(request):
    return request.param


def test_a_graph_is_written_as_ever(engine):
    pytest.importorskip("onnx", reason="the package onnx is not installed")
    assert write(graph(engine)) == GOLDEN[engine].read_bytes()


def test_a_graph_is_read_as_ever_without_onnx(engine):
    assert read(GOLDEN[engine].read_bytes()) == graph(engine)


def test_another_layer_reads_as_another(engine):
    found = read(GOLDEN[engine].read_bytes())
    for shape in ((24, 2, 64, EPS), (16, 4, 64, EPS), (16, 2, 32, EPS), (16, 2, 64, 1e-5)):
        assert found != layer_graph(*shape, engine == "onnx_int8")
    assert found != layer_graph(16, 2, 64, EPS, engine == "onnx")


def elsewhere(model):
    model.graph.initializer[0].external_data[0].value = "/etc/passwd"


def with_offset(model):
    model.graph.initializer[0].external_data.add(key="offset", value="0")


def nowhere(model):
    del model.graph.initializer[0].external_data[:]


def own_function(model):
    model.functions.add(name="Gelu", domain="", input=["x"], output=["y"])


def foreign_operator(model):
    model.graph.node[0].domain = "elsewhere"
    model.opset_import.add(domain="elsewhere", version=1)


def much_memory(model):
    size = model.graph.initializer.add(name="size", data_type=7, dims=[1])
    size.int64_data.append(1 << 40)
    model.graph.node.add(op_type="ConstantOfShape", input=["size"], output=["huge"], domain="")


def endless_loop(model):
    body = copy.deepcopy(model.graph)
    loop = model.graph.node.add(op_type="Loop", input=["", "", "x"], output=["z"], domain="")
    loop.attribute.add(name="body", type=5).g.CopyFrom(body)


def deep(model):
    """A graph in a graph in a graph."""
    inner = model.graph.node[0].attribute.add(name="body", type=5).g
    for _ in range(50):
        inner = inner.node.add(op_type="If", domain="").attribute.add(name="then_branch", type=5).g


def full(model):
    model.graph.initializer.add(name="full", data_type=1, dims=[2000], raw_data=bytes(8000))


def enlarged(model):
    model.graph.initializer[0].dims[0] = 1 << 60


def sparse(model):
    model.graph.sparse_initializer.add()


def configured(model):
    model.metadata_props.add(key="ort_config", value='{"session_options": {"inter_op_num_threads": 4096}}')


def out_of_range(model):
    next(one for one in model.graph.initializer if one.name == "at.v").int64_data[0] = 10


def other_axis(model):
    model.graph.node[0].attribute[0].i = 0


def two_kinds(model):
    model.graph.node[0].attribute[0].f = 1.0


def shorter(model):
    del model.graph.node[-1]


def newer(model):
    model.opset_import[0].version += 1


SPOILT = (
    elsewhere, with_offset, nowhere, own_function, foreign_operator, much_memory, endless_loop, deep, full, enlarged, sparse, configured,
    out_of_range, other_axis, two_kinds, shorter, newer,
)  # fmt: skip


@pytest.fixture
def encoder(tiny):
    config = tiny()
    return load_encoder(config.model, init_parts(config, config.plan(3).present))


@pytest.fixture
def refused(tmp_path, monkeypatch, encoder):
    """Why a device does not run the graph of these bytes, of which ONNX Runtime has seen nothing."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'lwfed[onnx]'")
    monkeypatch.setattr(prefix, "_session", lambda *_: pytest.fail("ONNX Runtime has got the graph"))

    def reason(engine, content):
        (tmp_path / "graph").write_bytes(content)
        with pytest.raises(InvalidPayload) as refusal:
            prefix.OnnxPrefix(encoder, 3, engine, tmp_path / "graph")
        return str(refusal.value)

    return reason


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_graph_that_asks_for_more_is_refused_unseen(engine, spoil, refused):
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
    model = onnx.load_from_string(GOLDEN[engine].read_bytes())
    spoil(model)
    assert refused(engine, model.SerializeToString())


FIELD_7, FIELD_25 = b"\x3a", b"\xca\x01"  # of a model: its graph, and functions; both hold bytes
ODD = {
    "nothing": (lambda content: b"", "unpack"),
    "zeros": (lambda content: bytes(len(content)), "field 0"),
    "twice, which protobuf would merge": (lambda content: content * 2, "unpack"),
    "one graph more": (lambda content: content + FIELD_7 + b"\0", "unpack"),
    "a function": (lambda content: content + FIELD_25 + b"\0", "field 25"),
    "a number that never ends": (lambda content: b"\xff" * 64, "cut off in a number"),
    "a length beyond the end": (lambda content: content + FIELD_7 + b"\xff\x7f", "cut off"),
    "a float as bytes, which protobuf would skip": (lambda content: content.replace(b"\x15\xbd7\x865", b"\x12\x04\xbd7\x865"), ""),
    "too much": (lambda content: content + bytes(MAX_GRAPH_BYTES), f"exceeds the {MAX_GRAPH_BYTES} allowed"),
}


@pytest.mark.parametrize(("change", "problem"), ODD.values(), ids=ODD)
def test_what_protobuf_makes_of_it_in_another_way_is_refused_too(engine, change, problem, refused):
    content = GOLDEN[engine].read_bytes()
    assert change(content) != content
    assert problem in refused(engine, change(content))


def under_another_name(content):
    return content.replace(b"\x12\x05layer", b"\x12\x05other")


def in_more_bytes(content):
    """The version, a number of one byte, in two."""
    return content.replace(b"\x08\x0a", b"\x08\x8a\x00", 1)


def in_another_order(content):
    """The version last."""
    return content[2:] + content[:2]


SAME = (under_another_name, in_more_bytes, in_another_order)


@pytest.fixture
def computed(engine):
    """What ONNX Runtime computes by the graph of these bytes, with weights none of which is 0 or 1."""
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'lwfed[onnx]'")
    random = torch.Generator().manual_seed(0)
    block = {name: torch.randn(tensor.shape, generator=random) * 0.3 for name, tensor in Block(16, 2, 64).state_dict().items()}
    given_at_start = prefix.weights(block, engine == "onnx_int8")
    tokens = torch.randn(3, 5, 16, generator=random).numpy()
    return lambda content: prefix._session(runtime, content, given_at_start).run(["y"], {"x": tokens})[0]


@pytest.mark.parametrize("rewrite", SAME)
def test_the_same_graph_in_other_bytes_computes_the_same(engine, rewrite, computed):
    golden = GOLDEN[engine].read_bytes()
    assert rewrite(golden) != golden
    assert read(rewrite(golden)) == graph(engine)
    assert np.array_equal(computed(rewrite(golden)), computed(golden))


def leaves(message):
    """Every value in it: its message, its field and, where there may be several, its place among them."""
    for field, value in message.ListFields():
        one = isinstance(value, (int, float, str, bytes)) or hasattr(value, "ListFields")
        for place, each in [(None, value)] if one else enumerate(value):
            if hasattr(each, "ListFields"):
                yield from leaves(each)
            else:
                yield message, field, place, each


def altered(random, samples):
    """One of `samples` with another value in one place: a graph still, whatever it says."""
    import onnx

    model = onnx.load_from_string(random.choice(samples))
    message, field, place, value = random.choice(list(leaves(model)))
    match value:
        case int() if field.enum_type is not None:
            other = random.choice([one.number for one in field.enum_type.values])
        case int() | float():
            other = random.choice([0, 1, value + 1, value * 2])
        case _:
            other = random.choice(["", "other", "x"])
    if place is None:
        setattr(message, field.name, other)
    else:
        getattr(message, field.name)[place] = other
    return model.SerializeToString()


@pytest.mark.parametrize("change", [mutated, altered])
def test_mutations_of_a_graph_are_refused_or_compute_the_same(engine, change, computed):
    pytest.importorskip("onnx", reason="the package onnx is not installed")
    golden = GOLDEN[engine].read_bytes()
    samples, expected = (golden, *(rewrite(golden) for rewrite in SAME)), computed(golden)

    @settings(max_examples=300, deadline=None)
    @given(st.integers(0, 2**63))
    def refused_or_the_same(seed):
        content = change(Random(seed), samples)
        try:
            found = read(content)
        except InvalidPayload:
            return
        if found == graph(engine):
            assert np.array_equal(computed(content), expected)

    refused_or_the_same()
