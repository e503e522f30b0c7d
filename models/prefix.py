"""The frozen layers below those that are trained: torch, or ONNX Runtime in float32 or int8.

ONNX Runtime runs each frozen layer in a session of its own, all of one small graph (`lwfed.models.onnx_layer`), so a stage
more is a session more and a skipped layer is a session not run. int8 quantises weights once per output, and activations
as they come, with one scale for a micro-batch: fast, and off by a fraction of a percent a layer. Another micro-batch gives other tokens.

A graph comes from the server, and no other than that of the layer gets to ONNX Runtime. An engine is used for a stage only
after its tokens have been compared with torch's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lwfed.child import kind_of_error
from lwfed.errors import InvalidPayload
from lwfed.models import onnx_file
from lwfed.models.allocator import give_back
from lwfed.models.encoder import Encoder
from lwfed.models.onnx_layer import INPUT, MATRICES, NO_GRAPH, NORMS, OUTPUT, Layer, layer_graph
from lwfed.models.vit import EPS, Block, VisionTransformer
from lwfed.plan import GraphEngine, PrefixEngine

# |theirs - torch's| / |torch's| of the tokens of each image. After 11 layers of ViT-Tiny int8 is off by 0.9 to 1.3 %, with weights as they
# begin and trained; by 4 % where channels differ more; by more than 6 % where some are 15 times the others, for which int8 is not fit.
TOLERANCE: Mapping[GraphEngine, float] = {"onnx": 1e-4, "onnx_int8": 0.05}
JUDGED_IMAGES = 8  # at least, of those that there are
KEPT_AS: Mapping[PrefixEngine, torch.dtype] = {"onnx_int8": torch.float16}  # tokens, until they are used; others as they are
SESSIONS: Mapping[PrefixEngine, float] = {"onnx": 1.0, "onnx_int8": 1 / 3}  # bytes of them, for each of the layers' weights in float32
TRIAL_S = 0.3  # for timing one engine

ABSENT = "ONNX Runtime is not installed: pip install 'lwfed[onnx]'"
FAILS = "ONNX Runtime fails as it is installed ({}): pip install --upgrade 'lwfed[onnx]', or pip uninstall onnxruntime: torch does its work"

Array = npt.NDArray[Any]
Found = TypeVar("Found")


class Prefix(Protocol):
    """Frozen layers: what the stem gives -> what the last of them gives, without gradients."""

    engine: PrefixEngine
    runtime: str | None  # version of ONNX Runtime; None: torch

    def __call__(self, x: Tensor, skip: Collection[int]) -> Tensor: ...


class TorchPrefix:
    engine: PrefixEngine = "torch"
    runtime: str | None = None

    def __init__(self, encoder: Encoder, layers: int) -> None:
        self._encoder, self._layers = encoder, layers

    @torch.no_grad()
    def __call__(self, x: Tensor, skip: Collection[int]) -> Tensor:
        return self._encoder.through(x, 0, self._layers, skip)


class OnnxPrefix:
    """Raises ImportError without ONNX Runtime, InvalidPayload for a graph that is not the layer's, and ONNX Runtime's errors."""

    def __init__(self, encoder: VisionTransformer, layers: int, engine: GraphEngine, graph: Path) -> None:
        import onnxruntime

        int8 = engine == "onnx_int8"
        self.engine: PrefixEngine = engine
        self.runtime: str | None = onnxruntime.__version__
        content = graph.read_bytes()
        if onnx_file.read(content) != _graph(encoder.blocks[0], int8):
            raise InvalidPayload("it computes something else than this layer")
        self._sessions = [_session(onnxruntime, content, weights(block.state_dict(), int8)) for block in encoder.blocks[:layers]]

    def __call__(self, x: Tensor, skip: Collection[int]) -> Tensor:
        tokens = x.float().numpy()
        for number, session in enumerate(self._sessions):
            if number not in skip:
                (tokens,) = session.run([OUTPUT], {INPUT: tokens})
        return torch.from_numpy(tokens)


@dataclass(frozen=True)
class Chosen:
    prefix: Prefix
    reason: str  # for people: why this one


def make_prefix(
    encoder: Encoder,
    layers: int,
    wanted: PrefixEngine | Literal["auto"],
    graphs: Mapping[GraphEngine, Path],
    trial: Tensor,
    micro_batch: int,
    torch_fits: bool = True,
) -> Chosen:
    """The engine `wanted`, or the fastest of those within tolerance; torch where nothing else will do.

    `trial` [images, tokens, width] is what the stem gives for some images, which go through the layers `micro_batch` at a time;
    `graphs` are of one of its layers. Torch is no candidate for the fastest unless `torch_fits` into memory.
    """
    plain = TorchPrefix(encoder, layers)
    if wanted == "torch" or layers == 0 or not isinstance(encoder, VisionTransformer):
        return Chosen(plain, "as configured" if wanted == "torch" else "nothing to gain")
    candidates = {engine: graph for engine, graph in graphs.items() if wanted in ("auto", engine)}
    if not candidates:
        return Chosen(plain, NO_GRAPH)
    pieces = torch.split(trial, micro_batch)
    reference = [plain(piece, ()) for piece in pieces]

    def judge(made: Prefix) -> tuple[float, float]:
        error = torch.cat([relative_errors(made(piece, ()), its) for piece, its in zip(pieces, reference, strict=True)]).max()
        return float(error), _time(made, pieces[0]) if wanted == "auto" else 0.0

    seconds: dict[PrefixEngine, float] = {}
    refused: list[str] = []
    for engine, graph in candidates.items():
        tried = _attempt(encoder, layers, engine, graph, judge)  # the one before has gone: memory holds one at a time
        if isinstance(tried, str):
            refused.append(f"{engine}: {tried}")
            continue
        made, (error, taken) = tried
        if not error <= TOLERANCE[engine]:  # nor is a NaN
            refused.append(f"{engine}: off by {error:.2%} of torch's tokens of an image, more than {TOLERANCE[engine]:.2%}")
        elif wanted != "auto":
            return Chosen(made, "as configured")
        else:
            seconds[engine] = taken
        del made, tried
        give_back()
    if torch_fits and wanted == "auto":
        seconds["torch"] = _time(plain, pieces[0])
    if not seconds:
        return Chosen(plain, "; ".join(refused))
    best = min(seconds, key=lambda engine: seconds[engine])
    speeds = ", ".join(f"{engine} {len(pieces[0]) / taken:.0f} views/s" for engine, taken in seconds.items())
    again = (plain, 0) if best == "torch" else _attempt(encoder, layers, best, candidates[best], lambda made: made(pieces[0], ()))
    if isinstance(again, str):  # it could be had a moment ago
        return Chosen(plain, again)
    return Chosen(again[0], "; ".join([speeds, *refused]))


def runtime_version() -> str | None:
    """Of ONNX Runtime, without importing it; None where it is not installed."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"):  # distributions of the same module
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def relative_errors(found: Tensor, reference: Tensor) -> Tensor:
    """Of each image [B]."""
    away, whole = (torch.linalg.vector_norm(one.flatten(1), dim=1) for one in (found - reference, reference))
    return torch.div(away, whole)


def _attempt(
    encoder: VisionTransformer, layers: int, engine: GraphEngine, graph: Path, judge: Callable[[Prefix], Found]
) -> tuple[Prefix, Found] | str:
    """The engine and what `judge` says of it, or why it cannot be had."""
    try:
        import onnxruntime  # noqa: F401 - by itself, since what fails here is no fault of the graph
    except ModuleNotFoundError as error:
        return ABSENT if error.name == "onnxruntime" else _fault(error, FAILS)
    except Exception as error:
        return _fault(error, FAILS)
    try:
        made = OnnxPrefix(encoder, layers, engine, graph)
        return made, judge(made)
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        return _fault(error, f"its graph {graph.name} does not work ({{}}): pip install --upgrade 'lwfed[onnx]'")


def _fault(error: Exception, otherwise: str) -> str:
    """Lack of memory, or else `otherwise` with the first line of what `error` says."""
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    if kind_of_error(error) == "OutOfMemory":
        return f"too little memory ({said})"
    return otherwise.format(said)


def weights(block: Mapping[str, Tensor], int8: bool) -> dict[str, Array]:
    """A layer's tensors as its graph wants them."""
    given: dict[str, Array] = {}
    for name in (*MATRICES, *NORMS):
        weight, given[f"{name}.bias"] = block[f"{name}.weight"].detach().numpy(), block[f"{name}.bias"].detach().numpy()
        if name in NORMS:
            given[f"{name}.weight"] = weight
        elif not int8:
            given[f"{name}.weight"] = np.ascontiguousarray(weight.T)
        else:
            given[f"{name}.weight"], given[f"{name}.weight.scale"] = quantise(weight)
    return given


def quantise(weight: Array) -> tuple[Array, Array]:
    """float32 [out, in] -> int8 [in, out] and a scale [out] each: weight[o, i] is about scale[o] * int8[i, o]."""
    scale = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny * 127).astype(np.float32) / np.float32(127)
    return np.ascontiguousarray(np.round(weight / scale[:, None]).T.astype(np.int8)), scale


def _graph(block: nn.Module, int8: bool) -> Layer:
    assert isinstance(block, Block)
    return layer_graph(block.attn.qkv.in_features, block.attn.heads, block.mlp.fc1.out_features, EPS, int8)


def _session(onnxruntime: Any, graph: bytes, given: Mapping[str, Array]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # an arena a session would hold the activations of every layer at once
    options.log_severity_level = 3
    options.add_external_initializers(list(given), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in given.values()])
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _time(prefix: Prefix, trial: Tensor) -> float:
    """Seconds for `trial`, the best of a few."""
    prefix(trial, ())
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 2 or time.perf_counter() - began < TRIAL_S:
        start = time.perf_counter()
        prefix(trial, ())
        taken.append(time.perf_counter() - start)
    return min(taken)
