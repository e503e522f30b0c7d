"""A layer's graph as bytes: written on the server, and read by a device before ONNX Runtime may see it.

ONNX Runtime would do whatever a graph asks for: read files, fill memory with a few constants, loop for ever, or die of what
its native code has not foreseen. So a device reads the bytes first, by the few messages of protobuf that a layer takes and nothing else,
and uses those only that say what it expects.

`python -m lwfed.models.onnx_file` writes the graph for each engine, in a process of its own, since the package onnx takes 40 MB.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from lwfed.errors import InvalidPayload
from lwfed.models.onnx_layer import FLOAT, INT, INTS, MICROSOFT, TENSOR_FLOAT, Attribute, Holder, Layer, Node, Tokens, layer_graph
from lwfed.wire.messages import MAX_GRAPH_BYTES

OPSETS = (("", 20), (MICROSOFT, 1))  # Gelu came with opset 20
IR_VERSION = 10  # both are older than every onnxruntime since 1.18
GIVEN = ("location", "given")  # of a tensor that is given when a session is made
EXTERNAL = 1  # onnx.TensorProto.DataLocation
VARINT, BYTES, FIXED32 = 0, 2, 5  # wire types of protobuf
LONGEST_VARINT = 10

Value = int | float | bytes  # by wire type


def write(graph: Layer) -> bytes:
    """Raises ImportError without onnx."""
    from onnx import NodeProto, TensorProto, ValueInfoProto, helper

    def holder(one: Holder) -> TensorProto:
        if one.values is not None:
            return helper.make_tensor(one.name, one.kind, one.shape, one.values)
        found = TensorProto(name=one.name, data_type=one.kind, dims=one.shape, data_location=TensorProto.EXTERNAL)
        found.external_data.add(key=GIVEN[0], value=GIVEN[1])
        return found

    def tokens(one: Tokens) -> ValueInfoProto:
        return helper.make_tensor_value_info(one.name, TENSOR_FLOAT, one.shape)

    def node(one: Node) -> NodeProto:
        found = helper.make_node(one.kind, one.inputs, [one.output], domain=one.domain)
        values = ((each.name, each.values if each.kind == INTS else each.values[0]) for each in one.attributes)
        found.attribute.extend(helper.make_attribute(*each) for each in values)
        return found

    nodes = [node(one) for one in graph.nodes]
    made = helper.make_graph(nodes, "layer", [tokens(graph.takes)], [tokens(graph.gives)], [holder(one) for one in graph.holders])
    opsets = [helper.make_opsetid(*opset) for opset in OPSETS]
    return bytes(helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())


def read(content: bytes) -> Layer:
    """All that `content` says. Raises InvalidPayload for whatever `write` writes of no layer."""
    if len(content) > MAX_GRAPH_BYTES:
        raise InvalidPayload(f"a graph of {len(content)} bytes exceeds the {MAX_GRAPH_BYTES} allowed")
    try:
        (version,), (graph,), opsets = _fields(content, 1, 7, 8)
        if version != IR_VERSION or tuple(_opset(one) for one in opsets) != OPSETS:
            raise ValueError("another version of ONNX")
        nodes, (_,), holders, (takes,), (gives,) = _fields(graph, 1, 2, 5, 11, 12)
        return Layer(tuple(map(_node, nodes)), tuple(map(_holder, holders)), _tokens(takes), _tokens(gives))
    except (ValueError, struct.error) as error:
        raise InvalidPayload(f"this is no graph of a layer ({error})") from None


def _opset(data: Value) -> tuple[str, int]:
    (domain,), (version,) = _fields(data, 1, 2)
    return _text(domain), _number(version)


def _node(data: Value) -> Node:
    inputs, (output,), (kind,), attributes, (domain,) = _fields(data, 1, 2, 4, 5, 7)
    return Node(_text(kind), tuple(map(_text, inputs)), _text(output), _text(domain), tuple(map(_attribute, attributes)))


def _attribute(data: Value) -> Attribute:
    (name,), floats, whole, several, (said,) = _fields(data, 1, 2, 3, 8, 20)
    kind = _number(said)
    values = {FLOAT: tuple(map(_float, floats)), INT: tuple(map(_number, whole)), INTS: tuple(map(_number, several))}
    found = values.pop(kind, ())
    if any(values.values()):
        raise ValueError("an attribute of two kinds")
    return Attribute(_text(name), kind, found)


def _holder(data: Value) -> Holder:
    shape, (said,), floats, whole, (name,), external, location = _fields(data, 1, 2, 4, 7, 8, 13, 14)
    kind, dims = _number(said), tuple(map(_number, shape))
    if location or external:
        (pair,) = external
        (key,), (value,) = _fields(pair, 1, 2)
        if location != [EXTERNAL] or (_text(key), _text(value)) != GIVEN or floats or whole:
            raise ValueError("a tensor in a file")
        return Holder(_text(name), kind, dims, None)
    (packed,) = floats or whole
    if (floats and whole) or bool(floats) != (kind == TENSOR_FLOAT):
        raise ValueError("a tensor of two kinds")
    return Holder(_text(name), kind, dims, _floats(packed) if floats else _numbers(packed))


def _tokens(data: Value) -> Tokens:
    (name,), (kind,) = _fields(data, 1, 2)
    ((tensor,),) = _fields(kind, 1)
    (element,), (shape,) = _fields(tensor, 1, 2)
    if element != TENSOR_FLOAT:
        raise ValueError("tokens of another kind")
    (dims,) = _fields(shape, 1)
    return Tokens(_text(name), tuple(map(_dim, dims)))


def _dim(data: Value) -> int | str:
    size, name = _fields(data, 1, 2)
    (said,) = size + name
    return _number(said) if size else _text(said)


def _fields(data: Value, *known: int) -> list[list[Value]]:
    """Of a message: for each of its fields `known` the values in it. Raises ValueError where there are other fields."""
    found: dict[int, list[Value]] = {number: [] for number in known}
    rest = _bytes(data)
    while rest:
        key, rest = _varint(rest)
        if key >> 3 not in found:
            raise ValueError(f"a field {key >> 3}")
        value, rest = _value(key & 7, rest)
        found[key >> 3].append(value)
    return list(found.values())


def _value(wire: int, data: bytes) -> tuple[Value, bytes]:
    """And what follows it."""
    if wire == VARINT:
        return _varint(data)
    if wire not in (BYTES, FIXED32):
        raise ValueError(f"a value of wire type {wire}")
    length, data = _varint(data) if wire == BYTES else (4, data)
    if length > len(data):
        raise ValueError("cut off")
    value, rest = data[:length], data[length:]
    return value if wire == BYTES else struct.unpack("<f", value)[0], rest


def _varint(data: bytes) -> tuple[int, bytes]:
    """And what follows it."""
    for place, byte in enumerate(data[:LONGEST_VARINT]):
        if byte < 0x80:
            return sum((each & 0x7F) << 7 * power for power, each in enumerate(data[: place + 1])), data[place + 1 :]
    raise ValueError("cut off in a number")


def _numbers(packed: Value) -> tuple[int, ...]:
    found = []
    rest = _bytes(packed)
    while rest:
        number, rest = _varint(rest)
        found.append(_number(number))
    return tuple(found)


def _floats(packed: Value) -> tuple[float, ...]:
    data = _bytes(packed)
    return struct.unpack(f"<{len(data) // 4}f", data)


def _number(value: Value) -> int:
    """int64, as a varint holds it."""
    if not isinstance(value, int):
        raise ValueError("another value in place of a number")
    return value - 2**64 if value >= 2**63 else value


def _float(value: Value) -> float:
    if not isinstance(value, float):
        raise ValueError("another value in place of a float")
    return value


def _text(value: Value) -> str:
    return _bytes(value).decode()


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number in place of bytes")
    return value


def main() -> None:
    width, heads, hidden, eps, *files = sys.argv[1:]
    for engine, file in (one.split("=", 1) for one in files):
        graph = layer_graph(int(width), int(heads), int(hidden), float(eps), engine == "onnx_int8")
        Path(file).write_bytes(write(graph))


if __name__ == "__main__":
    main()
