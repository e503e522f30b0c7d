"""What a run must know of an encoder without importing torch; `lwfed.models.backbones` builds them."""

from __future__ import annotations

from dataclasses import dataclass

VIT = "vit"


@dataclass(frozen=True)
class Traits:
    """A convolutional backbone of timm: its layers L_1..L_S are timm's stages, ``layer1`` .. or ``blocks.0`` .."""

    widths: tuple[int, ...]  # channels that each layer gives
    after: tuple[str, ...] = ()  # modules with which timm's model goes on after pooling; no part of the features

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


CONVOLUTIONAL: dict[str, Traits] = {
    "resnet18": Traits((64, 128, 256, 512)),
    "mobilenetv3_small_100": Traits((16, 24, 40, 48, 96, 576), after=("conv_head", "act2")),
}


def known(name: str) -> str:
    """`name`, when a backbone is called so; raises ValueError."""
    if name != VIT and name not in CONVOLUTIONAL:
        raise ValueError(f"must be one of {', '.join((VIT, *CONVOLUTIONAL))}")
    return name
