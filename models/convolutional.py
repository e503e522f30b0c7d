"""Convolutional backbones of timm, cut into stem and layers of one resolution each; tensor names are timm's.

Layers before the last give fewer channels than the whole encoder: while such a layer is the last one, a linear adapter
brings its pooled maps to the width of the features (arXiv 2401.11647 does so with ResNet-18).

Batch norms of what is trained use the statistics of the batch and keep running ones, which travel with the layer and are
averaged like weights; batch norms of the frozen prefix use the running ones. The momentum is constant, so the count
of batches, which could not be averaged, is not kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import ModelSection
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.errors import MissingDependency
from lwfed.models.encoder import MEAN, STD, Encoder


class Convolutional(Encoder):
    """With its first `layers` layers, 0 <= layers <= depth. Raises MissingDependency without timm."""

    def __init__(self, model: ModelSection, layers: int) -> None:
        super().__init__()
        traits = CONVOLUTIONAL[model.backbone]
        if not 0 <= layers <= traits.depth:
            raise ValueError(f"{model.backbone} has {traits.depth} layers and cannot have {layers}")
        whole = _timm(model)
        numbered = hasattr(whole, "layer1")  # ResNet's names; others keep a list of blocks
        self._stem_names = [name for name in ("conv1", "conv_stem", "bn1", "act1", "maxpool") if hasattr(whole, name)]
        for name in self._stem_names:
            self.add_module(name, whole.get_submodule(name))
        self._layer_names = [f"layer{number}" if numbered else f"blocks.{number - 1}" for number in range(1, layers + 1)]
        if numbered:
            for name in self._layer_names:
                self.add_module(name, whole.get_submodule(name))
        else:
            self.blocks = nn.ModuleList(whole.get_submodule(name) for name in self._layer_names)
        adapters = {str(layers): nn.Linear(traits.widths[layers - 1], traits.width)} if layers in traits.adapted else {}
        self.adapter = nn.ModuleDict(adapters)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None

    def stem(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        if keep is not None:
            raise ValueError("a convolutional backbone has no patches to hide")
        x = (images - MEAN) / STD
        for name in self._stem_names:
            x = self.get_submodule(name)(x)
        return x

    def layers(self) -> nn.ModuleList:
        return nn.ModuleList(self.get_submodule(name) for name in self._layer_names)

    def pool(self, x: Tensor) -> Tensor:
        features = x.mean(dim=(2, 3))
        for adapter in self.adapter.values():
            features = adapter(features)
        return features


def _timm(model: ModelSection) -> Any:
    import_torchvision()  # timm needs it, also where its compiled operators do not fit this torch
    try:
        import timm
    except ImportError as error:
        raise MissingDependency(f"model.backbone {model.backbone} needs timm: pip install 'lwfed[backbones]' ({error})") from None
    return timm.create_model(model.backbone, in_chans=model.channels, num_classes=0, global_pool="")
