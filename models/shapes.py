"""Names and shapes of every tensor of a model, taken from the module itself. All tensors are float32."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import nn

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import ModelSection, RunConfig
from lwfed.models.backbones import build_encoder
from lwfed.models.heads import build_head
from lwfed.plan import HEADS, by_part

Shape = tuple[int, ...]


def part_shapes(config: RunConfig, part: str) -> dict[str, Shape]:
    """The tensors of `part` (a name of `lwfed.plan`), in the order of the model.

    Raises ValueError when the model has no such part.
    """
    found = _head(config, part) if part in HEADS[config.ssl.method] else _encoder(config.model).get(part)
    if found is None:
        raise ValueError(f"a {config.model.backbone} of depth {config.model.depth} has no part {part!r}")
    return dict(found)


def shapes(config: RunConfig, parts: Iterable[str]) -> dict[str, Shape]:
    """The tensors of several parts, in the order given."""
    return {name: shape for part in parts for name, shape in part_shapes(config, part).items()}


@lru_cache(maxsize=8)
def _encoder(model: ModelSection) -> dict[str, dict[str, Shape]]:
    """Part -> tensor -> shape."""
    adapted = CONVOLUTIONAL[model.backbone].adapted if model.backbone in CONVOLUTIONAL else ()
    found: dict[str, Shape] = {}
    with torch.device("meta"):
        for layers in (*adapted, model.depth):  # adapters are there while their layer is the last one only
            found |= _shapes(build_encoder(model, layers))
    return by_part(found)


@lru_cache(maxsize=32)
def _head(config: RunConfig, part: str) -> dict[str, Shape]:
    with torch.device("meta"):
        return _shapes(build_head(config, part), f"{part}.")


def _shapes(module: nn.Module, prefix: str = "") -> dict[str, Shape]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
