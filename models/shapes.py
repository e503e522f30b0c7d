"""Names and shapes of every tensor of a model, taken from the module itself. All tensors are float32."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch

from lwfed.config import RunConfig
from lwfed.models.backbones import build_encoder
from lwfed.models.heads import build_head
from lwfed.plan import HEADS, by_part

Shape = tuple[int, ...]


def part_shapes(config: RunConfig, part: str) -> dict[str, Shape]:
    """The tensors of `part` (a name of `lwfed.plan`), in the order of the model.

    Raises ValueError when the model has no such part.
    """
    found = _all(config).get(part)
    if found is None:
        raise ValueError(f"a {config.model.backbone} of depth {config.model.depth} has no part {part!r}")
    return dict(found)


def shapes(config: RunConfig, parts: Iterable[str]) -> dict[str, Shape]:
    """The tensors of several parts, in the order given."""
    return {name: shape for part in parts for name, shape in part_shapes(config, part).items()}


@lru_cache(maxsize=8)
def _all(config: RunConfig) -> dict[str, dict[str, Shape]]:
    """Part -> tensor -> shape."""
    found: dict[str, Shape] = {}
    with torch.device("meta"):
        for layers in range(1, config.model.depth + 1):  # adapters are there while their layer is the last one only
            found |= {name: tuple(tensor.shape) for name, tensor in build_encoder(config.model, layers).state_dict().items()}
        for part in HEADS[config.ssl.method]:
            head = build_head(config, part).state_dict()
            found |= {f"{part}.{name}": tuple(tensor.shape) for name, tensor in head.items()}
    return by_part(found)
