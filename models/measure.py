"""What each part of a model takes for one sample, found by running the parts themselves.

Operations are counted on the meta device, where nothing is computed. What a backward pass keeps is counted on the CPU,
whose attention keeps less than that of the meta device. So the same code counts every backbone, method and size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from lwfed.backbones import CONVOLUTIONAL, VIT
from lwfed.config import ModelSection, RunConfig, SslSection, load_config
from lwfed.models.backbones import build_encoder
from lwfed.models.encoder import Encoder
from lwfed.models.heads import build_network
from lwfed.models.pixels import crop_resize
from lwfed.models.shapes import Shape, part_shapes
from lwfed.models.ssl import METHODS
from lwfed.models.vit import VisionTransformer
from lwfed.plan import DECODER, HEADS, NORM, PREDICTOR, STEM, adapter, layer

SAMPLES = 2  # batch norms want more than one
LAYER_NORM = torch.ops.aten.native_layer_norm

Run = Callable[[Tensor], Tensor]
Visit = Callable[[Encoder, str, Run, Tensor], Tensor]  # (network, part of it, how that is run, what goes in) -> what comes out


@dataclass(frozen=True)
class Part:
    """Of one sample, unless stated otherwise. Multiply-accumulates (MACs), and bytes in float32."""

    numbers: int  # in all its tensors: weights, and running statistics where it has them
    forward: float  # MACs
    backward: float  # MACs of the gradients of its weights and of what goes in
    weights_only: float  # MACs of the gradients of its weights, where nothing below it is trained
    normalised: float  # numbers that pass a LayerNorm
    kept_bytes: float  # kept from forward to backward pass, without what goes in
    entering_bytes: float  # what goes in, where that is kept too
    widest_bytes: float  # the largest tensor of all these
    given_bytes: float  # what comes out


@dataclass(frozen=True)
class Measured:
    parts: Mapping[str, Part]
    view_macs: float  # of making one view of one image
    loss_macs: float  # of one image: the loss alone, forward and backward, over a full batch


def measure(config: RunConfig) -> Measured:
    """All parts that the model of `config` has in any stage of any strategy. Raises MissingDependency without its backbone.

    Nothing counts but model, method and batch, so that configurations that differ in something else share what was found.
    """
    return _measure(config.model, config.ssl, config.train.batch_size)


@lru_cache(maxsize=8)
def _measure(model: ModelSection, ssl: SslSection, batch_size: int) -> Measured:
    base = load_config("base")
    train = base.train.model_copy(update={"batch_size": batch_size})
    config = base.model_copy(update={"model": model, "ssl": ssl, "train": train})
    macs, kept = _Macs(), _Kept()
    _walk(config, "meta", macs)
    _walk(config, "cpu", kept)
    parts = {
        part: Part(sum(prod(shape) for shape in part_shapes(config, part).values()), *macs.found[part], *kept.found[part])
        for part in macs.found
    }
    parts |= {layer(number): parts[layer(1)] for number in range(2, config.model.depth + 1) if layer(number) not in parts}
    return Measured(parts, _view_macs(config), _loss_macs(config, parts))


def _walk(config: RunConfig, device: str, visit: Visit) -> None:
    """Send a small batch through all parts, in the order of the model; of a ViT's layers, which are alike, through the first."""
    model, method = config.model, METHODS[config.ssl.method]
    network = _network(lambda: build_network(config, 1 if model.backbone == VIT else model.depth), device)
    keep = method.draw_kept(config, SAMPLES, torch.Generator().manual_seed(0))
    keep = None if keep is None else keep.to(device)
    x = torch.zeros(SAMPLES, model.channels, model.image_size, model.image_size, device=device)
    x = visit(network, STEM, lambda images: network.stem(images, keep), x)
    adapted = CONVOLUTIONAL[model.backbone].adapted if model.backbone in CONVOLUTIONAL else ()
    for number, one in enumerate(network.layers(), 1):
        x = visit(network, layer(number), one, x)
        if number in adapted:
            partial = _network(lambda number=number: build_encoder(model, number), device)  # type: ignore[misc]
            visit(partial, adapter(number), partial.pool, x)
    if method.sees_pixels:
        assert isinstance(network, VisionTransformer)
        assert keep is not None
        x = visit(network, NORM, network.final_norm, x)
        visit(network, DECODER, lambda tokens: network.get_submodule(DECODER)(tokens[:, tokens.shape[1] - keep.shape[1] :], keep), x)
        return
    x = visit(network, NORM, network.pool, x) if NORM in config.plan(1).present else network.pool(x)
    for head in HEADS[config.ssl.method]:
        x = visit(network, head, network.get_submodule(head), x)


def _network(build: Callable[[], Encoder], device: str) -> Encoder:
    """Of weights that nothing reads."""
    with torch.device("meta"):
        network = build()
    return network.to_empty(device=torch.device(device))


class _Macs:
    """Counts MACs, and numbers that are normalised."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float, float, float]] = {}

    def __call__(self, network: Encoder, part: str, run: Run, x: Tensor) -> Tensor:
        x = x.detach()
        forward, weights_only, normalised, _ = _count(run, x)
        _, backward, _, out = _count(run, x.requires_grad_())
        self.found[part] = forward, backward, weights_only, normalised
        return out


def _count(run: Run, x: Tensor) -> tuple[float, float, float, Tensor]:
    """MACs a sample of a forward and of a backward pass, numbers that are normalised, and what came out."""
    first, second = _counter(), _counter()
    with sdpa_kernel(SDPBackend.MATH):  # of whose operations all are counted
        with first:
            out = run(x)
        with second:
            out.backward(torch.empty_like(out))  # type: ignore[no-untyped-call]
    forward, normalised = _totals(first, len(x))
    return forward, _totals(second, len(x))[0], normalised, out


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={LAYER_NORM: lambda shape, *_, **__: prod(shape), **CONVOLUTION})


def _convolution_backward(out: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    """Each gradient takes what the forward pass takes. Torch's own formula leaves out that channels are in groups."""
    transposed, gradients = rest[4], sum(map(bool, rest[7][:2]))
    each: int = conv_flop_count(list(x), list(weight), list(out), transposed)
    return each * gradients


CONVOLUTION = {torch.ops.aten.convolution_backward: _convolution_backward}


def _totals(counter: FlopCounterMode, samples: int) -> tuple[float, float]:
    """(MACs, normalised numbers) a sample. The counter's operations are two to a MAC."""
    found: dict[Any, int] = dict(counter.get_flop_counts().get("Global", {}))
    normalised = found.pop(LAYER_NORM, 0)
    return sum(found.values()) / 2 / samples, normalised / samples


class _Kept:
    """Counts bytes that are kept for a backward pass: each storage once, weights not at all."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float, float, float]] = {}

    def __call__(self, network: Encoder, part: str, run: Run, x: Tensor) -> Tensor:
        own = {_address(tensor) for tensor in (*network.parameters(), *network.buffers())}
        kept: dict[int, Tensor] = {}  # held here, so that no address is used twice

        def on_save(tensor: Tensor) -> Tensor:
            if _address(tensor) not in own:
                kept.setdefault(_address(tensor), tensor)
            return tensor

        x = x.detach().requires_grad_(part != STEM)
        with torch.autograd.graph.saved_tensors_hooks(on_save, lambda tensor: tensor):
            out = run(x)
        sizes = {address: tensor.untyped_storage().nbytes() / len(x) for address, tensor in kept.items()}
        widest = max(sizes.values(), default=0.0)
        entering = sizes.pop(_address(x), 0.0)
        self.found[part] = sum(sizes.values()), entering, widest, out.nbytes / len(x)
        return out


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _view_macs(config: RunConfig) -> float:
    size, counter = config.model.image_size, _counter()
    images = torch.empty(SAMPLES, config.model.channels, size, size, device="meta")
    with counter:
        crop_resize(images, torch.empty(SAMPLES, 4, dtype=torch.int64, device="meta"), size)
    return _totals(counter, SAMPLES)[0]


def _loss_macs(config: RunConfig, parts: Mapping[str, Part]) -> float:
    method, batch = METHODS[config.ssl.method], config.train.batch_size
    if method.sees_pixels:
        return 0.0  # a mean
    counter = _counter()
    network = _network(lambda: build_network(config, 0), "meta")
    keys = [torch.empty(batch, config.ssl.output_dim, device="meta") for _ in range(method.view_count)]
    projected = [torch.empty_like(one, requires_grad=True) for one in keys]
    with counter:
        method.loss(network, projected, projected, keys, config.ssl).backward()  # type: ignore[no-untyped-call]
    predictor = parts.get(PREDICTOR)
    heads = 0.0 if predictor is None else method.view_count * (predictor.forward + predictor.backward)
    return _totals(counter, batch)[0] - heads
