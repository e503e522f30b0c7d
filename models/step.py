"""One optimiser step (arXiv 2401.11647, Algorithm 2).

The frozen prefix runs once per view, without gradients, and its tokens serve the online and the target branch: they
share its weights. What is frozen is decided before the forward pass; gradients dropped afterwards would save nothing.
Heads and loss need the full batch (BatchNorm; the negatives), prefix and layers do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.models.ema import Target
from lwfed.models.heads import Network, load_network
from lwfed.models.optimiser import AdamW
from lwfed.models.ssl import LOSSES
from lwfed.plan import STEM, in_model_order, part_of

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Branches:
    """What one local call holds; `prefix_layers` is None when nothing is frozen, not even the stem."""

    online: Network
    target: Target
    optimiser: AdamW
    prefix_layers: int | None


def prepare(config: RunConfig, tensors: Mapping[str, Tensor], trained: Iterable[str]) -> Branches:
    """Online branch, target and optimiser for training the parts `trained` of the model that `tensors` hold.

    Trained tensors are copied, frozen ones shared. Raises ValueError when something frozen follows something trained.
    """
    active = set(trained)
    mine = {name: tensor.clone() if part_of(name) in active else tensor for name, tensor in tensors.items()}
    online = load_network(config, mine)
    for name, tensor in online.named_parameters():
        tensor.requires_grad_(part_of(name) in active)
    optimised = {name: tensor for name, tensor in online.named_parameters() if tensor.requires_grad}
    layers = prefix_layers({part_of(name) for name in mine}, active)
    return Branches(online, Target(online), AdamW(optimised, config.train.weight_decay), layers)


def prefix_layers(present: set[str], trained: set[str]) -> int | None:
    """Layers of the frozen prefix; None without one. Raises ValueError when the frozen parts are not the first of the model."""
    order = in_model_order(present)
    frozen = [part for part in order if part not in trained]
    if not trained or trained - present or frozen != list(order[: len(frozen)]):
        raise ValueError(f"parts {sorted(trained)} cannot be trained: they must be the last of {list(order)}, and at least one")
    return sum(part.startswith("layer.") for part in frozen) if STEM in frozen else None


def train_step(branches: Branches, views: Pair, lr: float, config: RunConfig) -> float:
    """One step on two views, each float32 [B, C, H, W] in [0, 1], B >= 2; returns the loss before it.

    A loss that is not finite is returned without a step.
    """
    online, target = branches.online, branches.target
    inputs = [_frozen(branches, view) for view in views]
    with torch.no_grad():
        keys = [target.network.project(_features(branches, target.network, tokens)) for tokens in inputs]
    queries = [online.predict(_features(branches, online, tokens)) for tokens in inputs]
    loss = LOSSES[config.ssl.method]((queries[0], queries[1]), (keys[0], keys[1]), config.ssl)
    value = loss.item()
    if math.isfinite(value):
        loss.backward()  # type: ignore[no-untyped-call]
        branches.optimiser.step(lr)
        target.update(config.ssl.momentum)
    return value


@torch.no_grad()
def _frozen(branches: Branches, view: Tensor) -> Tensor:
    """The prefix's tokens [B, tokens, width], or the view itself where nothing is frozen."""
    return view if branches.prefix_layers is None else branches.online.prefix(view, branches.prefix_layers)


def _features(branches: Branches, network: Network, inputs: Tensor) -> Tensor:
    """Features [B, width] of what `_frozen` gave."""
    if branches.prefix_layers is None:
        return network.features(inputs)
    return network.rest(inputs, branches.prefix_layers)
