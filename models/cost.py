"""What a run costs a device, computed from the model itself: parameters, multiply-accumulates, bytes, memory.

Modules are run on the meta device and their operations counted, so every backbone, method and size is counted by the same
code. Two accounts are kept, both in multiply-accumulates (MACs) a sample, over all local epochs of the run:

* `gflops_paper`, as arXiv 2401.11647 counts (Tables 2 and 3): the online branch alone, one view (both for SimCLR), forward 1,
  backward 2 for what is trained, frozen parts forward only, LayerNorm 5 per element.
* `gflops_true`, what `lwfed.models.step` does: all views, the target branch, alignment, the second forward of a
  micro-batch; the backward of the patch projection gives no gradient of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lwfed.config import RunConfig
from lwfed.models.encoder import Encoder
from lwfed.models.heads import build_network
from lwfed.models.shapes import shapes
from lwfed.models.ssl import METHODS
from lwfed.plan import DECODER, NORM, PREDICTOR, PROJECTOR, STEM, StagePlan, Strategy, layer

STRATEGIES: tuple[Strategy, ...] = ("end_to_end", "layer_wise", "progressive")
NORM_MACS = 5  # of LayerNorm, per element, as fvcore counts
PAPER_GB = 2**20 * 1000  # the paper's GB: 1000 MiB


@dataclass(frozen=True)
class Part:
    """Forward pass of one part for one sample."""

    macs: float
    norms: float  # elements that pass a LayerNorm
    saved_bytes: float  # kept for a backward pass


@dataclass(frozen=True)
class StageCost:
    """One device in one stage, over all its rounds."""

    strategy: Strategy
    stage: int
    layers: int
    rounds: int
    parameters: int  # present
    trained: int  # of them
    gflops_paper: float
    gflops_true: float
    memory_mb: float  # of training, above the worker's baseline; an estimate


def stage_cost(config: RunConfig, stage: int) -> StageCost:
    """Cost of `stage` under the strategy of `config`."""
    plan, rounds = config.plan(stage), config.round_counts[stage - 1]
    parts = measure(config, plan.layers)
    epochs = rounds * config.train.epochs
    return StageCost(
        strategy=plan.strategy,
        stage=stage,
        layers=plan.layers,
        rounds=rounds,
        parameters=count(config, plan.present),
        trained=count(config, plan.trained),
        gflops_paper=paper_macs(config, plan, parts) * epochs / 1e9,
        gflops_true=true_macs(config, plan, parts) * epochs / 1e9,
        memory_mb=memory_bytes(config, plan, parts) / 1e6,
    )


def count(config: RunConfig, parts: Iterable[str]) -> int:
    """Parameters of `parts`."""
    return sum(prod(shape) for shape in shapes(config, parts).values())


def paper_macs(config: RunConfig, plan: StagePlan, parts: Mapping[str, Part]) -> float:
    """Of one sample in one epoch, as the paper counts."""
    views = 2 if config.ssl.method == "simclr" else 1
    return views * sum((3 if part in plan.trained else 1) * (parts[part].macs + NORM_MACS * parts[part].norms) for part in plan.present)


def true_macs(config: RunConfig, plan: StagePlan, parts: Mapping[str, Part]) -> float:
    """Of one sample in one epoch, as `lwfed.models.step` computes it."""
    method = METHODS[config.ssl.method]
    views, trained = method.view_count, set(plan.trained)

    def forward(wanted: Iterable[str]) -> float:
        return sum(parts[part].macs for part in wanted)

    kept = 1 - config.stages.depth_dropout
    prefix = sum(parts[part].macs * (1 if part == STEM else kept) for part in plan.frozen)
    heads = trained & {PROJECTOR, PREDICTOR}
    encoder = trained - heads  # with a decoder, which sees one sample at a time as layers do
    branch = forward(encoder - {DECODER}) + forward(trained & {PROJECTOR})
    online = 3 * forward(trained) - (parts[STEM].macs if STEM in trained and config.model.backbone == "vit" else 0)
    again = forward(encoder) if config.train.micro_batch else 0
    further = {"off": 0, "cosine": 1, "moon": 2}[config.alignment.method]
    return views * (prefix + online + again + method.has_target * branch) + further * branch


def memory_bytes(config: RunConfig, plan: StagePlan, parts: Mapping[str, Part]) -> float:
    """Weights, optimiser state and branches; what the prefix gives for a batch; what a backward pass keeps."""
    method, batch = METHODS[config.ssl.method], config.train.batch_size
    piece = min(config.train.micro_batch or batch, batch)
    trained = count(config, plan.trained)
    branches = (method.has_target + {"off": 0, "cosine": 1, "moon": 2}[config.alignment.method]) * trained
    weights = 4 * (count(config, plan.present) + 4 * trained + branches)  # weight, gradient and AdamW's two moments
    tokens = 4 * method.view_count * batch * passing(config, plan) if plan.frozen else 0
    per_sample = {part: parts[part].saved_bytes for part in plan.trained}
    heads = batch * method.view_count * sum(per_sample.pop(part, 0.0) for part in (PROJECTOR, PREDICTOR))
    at_once = piece if piece < batch else batch * method.view_count
    return weights + tokens + heads + at_once * sum(per_sample.values())


def paper_bytes(config: RunConfig, worst: bool = False) -> float:
    """Down and up over the run by the paper's account: float32, heads counted, neither headers nor a first download.

    Calibration of the whole model adds the frozen parts to each round's download, or all of F_s once a stage. `worst` (Table 5):
    F_s is downloaded in every round.
    """
    total = 0
    for stage, rounds in enumerate(config.round_counts, 1):
        plan = config.plan(stage)
        down, up = plan.present if worst else plan.trained, plan.trained
        total += rounds * 4 * (count(config, down) + count(config, up))
        if worst or config.calibration.scope == "active":
            continue
        every = config.calibration.every
        if every == "stage":
            total += 4 * count(config, plan.calibrated)
        elif every != "never":
            total += rounds // (1 if every == "round" else every) * 4 * count(config, plan.frozen)
    return float(total)


def passing(config: RunConfig, plan: StagePlan) -> float:
    """Numbers a sample that the frozen prefix hands to the trained layers."""
    return _measured(config, plan.layers)[1][sum(part.startswith("layer.") for part in plan.frozen)]


def measure(config: RunConfig, layers: int) -> Mapping[str, Part]:
    """Forward pass of each part of the encoder with `layers` layers and of the heads."""
    return _measured(config, layers)[0]


@lru_cache(maxsize=64)
def _measured(config: RunConfig, layers: int) -> tuple[Mapping[str, Part], tuple[float, ...]]:
    """(part -> its forward pass, numbers a sample after the stem and after each layer)."""
    model, method = config.model, METHODS[config.ssl.method]
    network = _network(config, layers)
    found: dict[str, Part] = {}
    images = torch.empty(SAMPLES, model.channels, model.image_size, model.image_size, device="meta")
    kept = method.draw_kept(config, SAMPLES, torch.Generator().manual_seed(0))
    keep = None if kept is None else kept.to("meta")
    found[STEM], x = _run(network, lambda: network.stem(images, keep))
    sizes = [x[0].numel()]
    for number, one in enumerate(network.layers(), 1):
        found[layer(number)], x = _run(one, lambda one=one, x=x: one(x))  # type: ignore[misc]
        sizes.append(x[0].numel())
    pooled, features = _run(network, lambda: network.pool(x))
    tail = config.plan(config.stage_count).present
    adapters = [f"adapter.{name}" for name in getattr(network, "adapter", {})]
    for part in [*adapters, *([NORM] if NORM in tail else [])]:
        found[part] = pooled
    if method.sees_pixels:
        assert keep is not None
        decoder, tokens = network.get_submodule(DECODER), x[:, x.shape[1] - keep.shape[1] :]
        found[DECODER], _ = _run(decoder, lambda: decoder(tokens, keep))
        return found, tuple(sizes)
    z = features
    for part in (PROJECTOR, PREDICTOR):
        if hasattr(network, part):
            head = network.get_submodule(part)
            found[part], z = _run(head, lambda head=head, z=z: head(z))  # type: ignore[misc]
    return found, tuple(sizes)


SAMPLES = 2  # batch norms want more than one


def _network(config: RunConfig, layers: int) -> Encoder:
    with torch.device("meta"):
        return build_network(config, layers)


def _run(module: nn.Module, forward: Callable[[], Tensor]) -> tuple[Part, Tensor]:
    """Run it; what it took for one sample, and what it gave."""
    norms, saved, seen = 0, 0, {id(tensor) for tensor in module.parameters()}

    def on_norm(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
        nonlocal norms
        norms += inputs[0].numel()

    def on_save(tensor: Tensor) -> Tensor:
        nonlocal saved
        storage = tensor.untyped_storage()._cdata
        if id(tensor) not in seen and storage not in seen and not isinstance(tensor, nn.Parameter):
            seen.add(storage)
            saved += tensor.numel() * tensor.element_size()
        return tensor

    hooks = [one.register_forward_hook(on_norm) for one in module.modules() if isinstance(one, nn.LayerNorm)]
    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(on_save, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH), counter:
        out = forward()
    for hook in hooks:
        hook.remove()
    return Part(counter.get_total_flops() / 2 / SAMPLES, norms / SAMPLES, saved / SAMPLES), out.detach()
