"""What a run must know of an encoder without importing torch; `lwfed.models.backbones` builds them."""

from __future__ import annotations

from dataclasses import dataclass

VIT = "vit"


@dataclass(frozen=True)
class Traits:
    """A convolutional backbone of timm: its layers L_1..L_S are timm's stages."""

    layer: str  # their names there
    first: int  # the number in the first one's
    widths: tuple[int, ...]  # channels that each layer gives
    last_norm: str = ""  # of a residual block: its scale begins at 0, so that a block begins as its shortcut
    after: tuple[str, ...] = ()  # modules with which timm's model goes on after pooling; no part of the features

    @property
    def depth(self) -> int:
        return len(self.widths)

    @property
    def width(self) -> int:
        """Of the features: all narrower layers get an adapter while they are the last one (ResNet-18: arXiv 2401.11647)."""
        return self.widths[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """timm's modules L_1..L_S."""
        return tuple(f"{self.layer}{number}" for number in range(self.first, self.first + self.depth))

    @property
    def adapted(self) -> tuple[int, ...]:
        """Layers (1-based) that need an adapter."""
        return tuple(number for number, width in enumerate(self.widths, 1) if width != self.width)


CONVOLUTIONAL: dict[str, Traits] = {
    "resnet18": Traits("layer", 1, (64, 128, 256, 512), last_norm="bn2"),
    "mobilenetv3_small_100": Traits("blocks.", 0, (16, 24, 40, 48, 96, 576), after=("conv_head", "act2")),
}


def known(name: str) -> str:
    """`name`, when a backbone is called so; raises ValueError."""
    if name != VIT and name not in CONVOLUTIONAL:
        raise ValueError(f"must be one of {', '.join((VIT, *CONVOLUTIONAL))}")
    return name
