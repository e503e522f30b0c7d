"""One layer of the Vision Transformer as an ONNX graph without weights; all frozen layers run in sessions of this one graph.

A graph of the whole prefix would have to be made anew at each stage. One of a single layer is a few KB, is made once for a
run, and weights go in when a session is made. The tensors' names are those of the layer, with matrices transposed;
with int8 a matrix ``W`` becomes ``W``, int8 with a scale for each output, and ``W.scale``.

`python -m lwfed.models.onnx_layer` writes it for each engine, in a process of its own, which takes 40 MB.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MATRICES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
NORMS = ("norm1", "norm2")
OPSET, IR_VERSION = 20, 10  # Gelu came with opset 20; both are older than every onnxruntime since 1.18
INPUT, OUTPUT = "x", "y"
NO_GRAPH = "the server has sent no graph"  # why torch runs frozen layers


def layer_graph(width: int, heads: int, hidden: int, eps: float, int8: bool) -> bytes:
    """tokens float32 [batch, tokens, width] -> the same, as `lwfed.models.vit.Block`. Raises ImportError without onnx."""
    from onnx import TensorProto, helper

    nodes: list[Any] = []
    holders: list[Any] = []
    sizes = {"attn.qkv": (width, 3 * width), "attn.proj": (width, width), "mlp.fc1": (width, hidden), "mlp.fc2": (hidden, width)}

    def add(kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def hold(name: str, kind: int, shape: Sequence[int]) -> str:
        """A tensor that is given when a session is made."""
        holder = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        holder.external_data.add(key="location", value="given")
        holders.append(holder)
        return name

    def constant(name: str, kind: int, values: Sequence[float], shape: Sequence[int]) -> str:
        holders.append(helper.make_tensor(name, kind, shape, values))
        return name

    def linear(x: str, name: str, output: str) -> str:
        bias = hold(f"{name}.bias", TensorProto.FLOAT, sizes[name][1:])
        if not int8:
            weight = hold(f"{name}.weight", TensorProto.FLOAT, sizes[name])
            return add("Add", [add("MatMul", [x, weight], f"{output}.product"), bias], output)
        weight = hold(f"{name}.weight", TensorProto.INT8, sizes[name])
        scale = hold(f"{name}.weight.scale", TensorProto.FLOAT, sizes[name][1:])
        return add("DynamicQuantizeMatMul", [x, weight, scale, "", bias], output, domain="com.microsoft")

    def norm(x: str, name: str, output: str) -> str:
        parameters = [hold(f"{name}.{which}", TensorProto.FLOAT, [width]) for which in ("weight", "bias")]
        return add("LayerNormalization", [x, *parameters], output, axis=-1, epsilon=eps)

    qkv = linear(norm(INPUT, "norm1", "normed"), "attn.qkv", "qkv")
    split = add("Reshape", [qkv, constant("split", TensorProto.INT64, [0, 0, 3, heads, width // heads], [5])], "heads")
    places = {"q": (0, [0, 2, 1, 3]), "k": (1, [0, 2, 3, 1]), "v": (2, [0, 2, 1, 3])}
    for name, (place, order) in places.items():
        one = add("Gather", [split, constant(f"at.{name}", TensorProto.INT64, [place], [])], f"{name}.rows", axis=2)
        add("Transpose", [one], name, perm=order)  # q, v [batch, heads, tokens, d]; k [batch, heads, d, tokens]
    scaled = add("Mul", ["q", constant("scale", TensorProto.FLOAT, [(width // heads) ** -0.5], [])], "scaled")
    attention = add("Softmax", [add("MatMul", [scaled, "k"], "scores")], "attention", axis=-1)
    mixed = add("Transpose", [add("MatMul", [attention, "v"], "mixed")], "mixed.rows", perm=[0, 2, 1, 3])
    joined = add("Reshape", [mixed, constant("join", TensorProto.INT64, [0, 0, width], [3])], "joined")
    between = add("Add", [INPUT, linear(joined, "attn.proj", "projected")], "between")
    inner = add("Gelu", [linear(norm(between, "norm2", "normed.again"), "mlp.fc1", "inner")], "active")
    add("Add", [between, linear(inner, "mlp.fc2", "outer")], OUTPUT)

    tokens = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", width]) for name in (INPUT, OUTPUT)]
    graph = helper.make_graph(nodes, "layer", tokens[:1], tokens[1:], holders)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())


def main() -> None:
    width, heads, hidden, eps, *files = sys.argv[1:]
    for engine, file in (one.split("=", 1) for one in files):
        Path(file).write_bytes(layer_graph(int(width), int(heads), int(hidden), float(eps), engine == "onnx_int8"))


if __name__ == "__main__":
    main()
