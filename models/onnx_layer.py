"""One layer of the Vision Transformer as an ONNX graph without weights; all frozen layers run in sessions of this one graph.

A graph of the whole prefix would have to be made anew at each stage. One of a single layer is a few KB, is made once for a
run, and weights go in when a session is made. The tensors' names are those of the layer, with matrices transposed;
with int8 a matrix ``W`` becomes ``W``, int8 with a scale for each output, and ``W.scale``.

`lwfed.models.onnx_file` writes it where there is the package onnx, and reads it where there is none.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

MATRICES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
NORMS = ("norm1", "norm2")
INPUT, OUTPUT = "x", "y"
MICROSOFT = "com.microsoft"
NO_GRAPH = "there is no graph for ONNX Runtime"  # why torch runs frozen layers
TENSOR_FLOAT, TENSOR_INT8, TENSOR_INT64 = 1, 3, 7  # onnx.TensorProto.DataType
FLOAT, INT, INTS = 1, 2, 7  # onnx.AttributeProto.AttributeType


@dataclass(frozen=True)
class Attribute:
    name: str
    kind: int
    values: tuple[float, ...]  # one, unless `kind` is INTS


@dataclass(frozen=True)
class Node:
    kind: str
    inputs: tuple[str, ...]
    output: str
    domain: str
    attributes: tuple[Attribute, ...]  # by name


@dataclass(frozen=True)
class Holder:
    """A tensor of the graph, or the place of one."""

    name: str
    kind: int
    shape: tuple[int, ...]
    values: tuple[float, ...] | None  # None: given when a session is made


@dataclass(frozen=True)
class Tokens:
    """float32; a dimension is a number, or has a name."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Layer:
    nodes: tuple[Node, ...]
    holders: tuple[Holder, ...]
    takes: Tokens
    gives: Tokens


def layer_graph(width: int, heads: int, hidden: int, eps: float, int8: bool) -> Layer:
    """tokens float32 [batch, tokens, width] -> the same, as `lwfed.models.vit.Block`."""
    nodes: list[Node] = []
    holders: list[Holder] = []
    sizes = {"attn.qkv": (width, 3 * width), "attn.proj": (width, width), "mlp.fc1": (width, hidden), "mlp.fc2": (hidden, width)}

    def add(kind: str, inputs: Sequence[str], output: str, *attributes: Attribute, domain: str = "") -> str:
        nodes.append(Node(kind, tuple(inputs), output, domain, attributes))
        return output

    def hold(name: str, kind: int, shape: Sequence[int], values: Sequence[float] | None = None) -> str:
        holders.append(Holder(name, kind, tuple(shape), None if values is None else tuple(values)))
        return name

    def linear(x: str, name: str, output: str) -> str:
        bias = hold(f"{name}.bias", TENSOR_FLOAT, sizes[name][1:])
        if not int8:
            weight = hold(f"{name}.weight", TENSOR_FLOAT, sizes[name])
            return add("Add", [add("MatMul", [x, weight], f"{output}.product"), bias], output)
        weight = hold(f"{name}.weight", TENSOR_INT8, sizes[name])
        scale = hold(f"{name}.weight.scale", TENSOR_FLOAT, sizes[name][1:])
        return add("DynamicQuantizeMatMul", [x, weight, scale, "", bias], output, domain=MICROSOFT)

    def norm(x: str, name: str, output: str) -> str:
        parameters = [hold(f"{name}.{which}", TENSOR_FLOAT, [width]) for which in ("weight", "bias")]
        return add("LayerNormalization", [x, *parameters], output, _axis(-1), Attribute("epsilon", FLOAT, (_float32(eps),)))

    def transpose(x: str, order: Sequence[int], output: str) -> str:
        return add("Transpose", [x], output, Attribute("perm", INTS, tuple(order)))

    qkv = linear(norm(INPUT, "norm1", "normed"), "attn.qkv", "qkv")
    split = add("Reshape", [qkv, hold("split", TENSOR_INT64, [5], [0, 0, 3, heads, width // heads])], "heads")
    places = {"q": (0, [0, 2, 1, 3]), "k": (1, [0, 2, 3, 1]), "v": (2, [0, 2, 1, 3])}
    for name, (place, order) in places.items():
        one = add("Gather", [split, hold(f"at.{name}", TENSOR_INT64, [], [place])], f"{name}.rows", _axis(2))
        transpose(one, order, name)  # q, v [batch, heads, tokens, d]; k [batch, heads, d, tokens]
    scaled = add("Mul", ["q", hold("scale", TENSOR_FLOAT, [], [_float32((width // heads) ** -0.5)])], "scaled")
    attention = add("Softmax", [add("MatMul", [scaled, "k"], "scores")], "attention", _axis(-1))
    mixed = transpose(add("MatMul", [attention, "v"], "mixed"), [0, 2, 1, 3], "mixed.rows")
    joined = add("Reshape", [mixed, hold("join", TENSOR_INT64, [3], [0, 0, width])], "joined")
    between = add("Add", [INPUT, linear(joined, "attn.proj", "projected")], "between")
    inner = add("Gelu", [linear(norm(between, "norm2", "normed.again"), "mlp.fc1", "inner")], "active")
    add("Add", [between, linear(inner, "mlp.fc2", "outer")], OUTPUT)
    takes, gives = (Tokens(name, ("batch", "tokens", width)) for name in (INPUT, OUTPUT))
    return Layer(tuple(nodes), tuple(holders), takes, gives)


def _axis(number: int) -> Attribute:
    return Attribute("axis", INT, (number,))


def _float32(value: float) -> float:
    """What is left of it in a file."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
