"""Convolutional backbones of timm, cut into stem and layers; tensor names and numerics are timm's.

Layers before the last give fewer channels than the whole encoder: while such a layer is the last one, a linear adapter
brings its pooled maps to the width of the features (arXiv 2401.11647 does so with ResNet-18).

Batch norms of what is trained use the statistics of the batch and keep running ones, which travel with their layer and are
averaged like weights; batch norms of the frozen prefix use the running ones and leave them as they are. The momentum is
constant, so the count of batches, an integer that could not be averaged, is not kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import ModelSection
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.errors import MissingDependency
from lwfed.models.encoder import MEAN, STD, Encoder

COUNT = "num_batches_tracked"


class Convolutional(Encoder):
    """With its first `layers` layers, 0 <= layers <= depth. Raises MissingDependency without timm."""

    def __init__(self, model: ModelSection, layers: int) -> None:
        super().__init__()
        traits = CONVOLUTIONAL[model.backbone]
        if not 0 <= layers <= traits.depth:
            raise ValueError(f"an encoder of depth {traits.depth} cannot have {layers} layers")
        whole = _timm(model)
        for name in traits.names[layers:]:
            whole.set_submodule(name, nn.Identity())
        children = [name for name, _ in whole.named_children()]
        holders = list(dict.fromkeys(name.partition(".")[0] for name in traits.names))  # layer1 .. layer4, or blocks
        self._stem, self._layers = children[: children.index(holders[0])], traits.names[:layers]
        for name in (*self._stem, *holders):
            self.add_module(name, whole.get_submodule(name))
        adapters = {str(layers): nn.Linear(traits.widths[layers - 1], traits.width)} if layers in traits.adapted else {}
        self.adapter = nn.ModuleDict(adapters)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None
        self.register_load_state_dict_post_hook(_without_counts)  # type: ignore[no-untyped-call]

    def stem(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is not None:
            raise ValueError("a convolutional backbone has no patches to hide")
        x = (images - MEAN) / STD
        for name in self._stem:
            x = self.get_submodule(name)(x)
        return x

    def layers(self) -> Sequence[nn.Module]:
        return [self.get_submodule(name) for name in self._layers]

    def pool(self, x: Tensor) -> Tensor:
        features = x.mean(dim=(2, 3))
        for adapter in self.adapter.values():
            features = adapter(features)
        return features


def _without_counts(module: nn.Module, keys: Any) -> None:
    """Batch norms expect a count in every file, and find the one they make up unexpected where none is kept."""
    keys.unexpected_keys[:] = [name for name in keys.unexpected_keys if not name.endswith(COUNT)]


def _timm(model: ModelSection) -> Any:
    """A module of the caller's own, weights undefined."""
    return copy.deepcopy(_without_weights(model.backbone, model.channels)).to_empty(device=torch.empty(0).device)


@lru_cache(maxsize=8)
def _without_weights(backbone: str, channels: int) -> Any:
    """To be copied, which takes less than making it; on a processor, where timm draws weights, an eighth."""
    try:
        import_torchvision()  # timm needs it, also where its compiled operators do not fit this torch
        import timm
    except (ImportError, MissingDependency) as error:
        raise MissingDependency(f"model.backbone {backbone} needs timm: pip install 'lwfed[backbones]' ({error})") from None
    with torch.device("meta"):
        return timm.create_model(backbone, in_chans=channels, num_classes=0)
