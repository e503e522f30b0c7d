"""What a run must know of an encoder without importing torch; `lwfed.models.backbones` builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Backbone = Literal["vit", "resnet18", "mobilenetv3_small_100"]


@dataclass(frozen=True)
class Traits:
    """A convolutional backbone of timm: its layers L_1..L_S are its stages of one resolution."""

    widths: tuple[int, ...]  # channels that each layer gives

    @property
    def depth(self) -> int:
        return len(self.widths)

    @property
    def width(self) -> int:
        """Of the features: all narrower layers get an adapter while they are the last one (ResNet-18: arXiv 2401.11647)."""
        return self.widths[-1]

    @property
    def adapted(self) -> tuple[int, ...]:
        """Layers (1-based) that need an adapter."""
        return tuple(number for number, width in enumerate(self.widths, 1) if width != self.width)


CONVOLUTIONAL: Mapping[str, Traits] = {
    "resnet18": Traits((64, 128, 256, 512)),
    "mobilenetv3_small_100": Traits((16, 24, 40, 48, 96, 576)),
}
