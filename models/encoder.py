"""The encoder F: stem, layers L_1..L_S and pooling. What every backbone is to the rest of the program.

A new backbone is a subclass of `Encoder`, with tensors named so that `lwfed.plan.part_of` finds their parts, and a line in
`lwfed.models.backbones`. Weights are undefined until loaded; `lwfed.models.initial` draws them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lwfed.plan import by_part, part_of

# Pixels in [0, 1] become [-1, 1]. Constants rather than a data set's statistics: no device need share its own.
MEAN, STD = 0.5, 0.5


class Encoder(nn.Module, ABC):
    """An encoder with its first layers, onto which `lwfed.models.heads` puts the heads of a method.

    `x` below is what flows from layer to layer: tokens [B, tokens, width] or maps [B, channels, height, width].
    """

    @abstractmethod
    def stem(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """float32 [B, C, H, W] in [0, 1] -> x; of the patches only those of `keep` (int64 [B, visible]) where it is given."""

    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """L_1..L_n, each x -> x."""

    @abstractmethod
    def pool(self, x: Tensor) -> Tensor:
        """What the last layer gives -> features [B, width]."""

    def through(self, x: Tensor, first: int = 0, last: int | None = None, skip: Collection[int] = ()) -> Tensor:
        """Apply the layers number `first` to `last` (0-based, last excluded) without those of `skip`."""
        layers = self.layers()
        for number in range(first, len(layers) if last is None else last):
            if number not in skip:
                x = layers[number](x)
        return x

    def features(self, images: Tensor) -> Tensor:
        """float32 [B, C, H, W] in [0, 1] -> [B, width]."""
        return self.pool(self.through(self.stem(images)))

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def freeze(encoder: Encoder, trained: Collection[str]) -> None:
    """Only the parts `trained` take gradients; batch norms of the others use and keep their running statistics."""
    for name, tensor in encoder.named_parameters():
        tensor.requires_grad_(part_of(name) in trained)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(part_of(f"{name}.") in trained)


def layer_count(tensors: Mapping[str, Tensor]) -> int:
    """How many layers `tensors` hold."""
    return sum(part.startswith("layer.") for part in by_part(tensors))
