"""The two random views of each image of a batch.

All random numbers of a batch are drawn first, from one generator, into a record; transforms then use the record and
nothing else. Kinds of augmentation: arXiv 2401.11647, section 4.1; order: crop, flip, colour jitter, grayscale, blur,
solarisation, as BYOL and MoCo v3 apply them (the flip commutes with the rest).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lwfed.config import ViewsSection
from lwfed.models import pixels

ASPECT = (3 / 4, 4 / 3)  # width / height of a crop, as torchvision's RandomResizedCrop
ATTEMPTS = 10  # boxes tried before the whole image is taken, as there
JITTER = (pixels.adjust_brightness, pixels.adjust_contrast, pixels.adjust_saturation, pixels.adjust_hue)


@dataclass(frozen=True)
class ViewParams:
    """What happens to each sample of a batch in one view."""

    boxes: Tensor  # [B, 4] int64: top, left, height, width in pixels of the source
    flip: Tensor  # [B] bool
    jitter: Tensor  # [B] bool
    order: Tensor  # [B, 4] int64: the n-th adjustment, an index of JITTER
    amounts: Tensor  # [B, 4] factors of brightness, contrast, saturation; shift of hue
    grayscale: Tensor  # [B] bool
    sigma: Tensor  # [B] pixels; 0: no blur
    solarise: Tensor  # [B] bool

    @classmethod
    def cat(cls, several: Sequence[ViewParams]) -> ViewParams:
        return cls(**{one.name: torch.cat([getattr(params, one.name) for params in several]) for one in fields(cls)})

    def to(self, device: torch.device) -> ViewParams:
        return ViewParams(**{one.name: getattr(self, one.name).to(device) for one in fields(self)})

    def __getitem__(self, rows: slice | Tensor) -> ViewParams:
        return ViewParams(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})


def draw(views: ViewsSection, view: int, count: int, size: int, generator: torch.Generator) -> ViewParams:
    """The record of view 0 or 1 of `count` square images of `size` pixels; always draws the same number of values."""
    strengths = torch.tensor([views.brightness, views.contrast, views.saturation, views.hue])
    signs = 2 * torch.rand(count, 4, generator=generator) - 1
    low, high = views.blur_sigma
    sigma = low + (high - low) * torch.rand(count, generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=generator) < probability

    return ViewParams(
        boxes=draw_boxes(views.crop_scale, count, size, generator),
        flip=chance(views.flip),
        jitter=chance(views.jitter),
        order=torch.rand(count, 4, generator=generator).argsort(dim=1),
        amounts=torch.tensor([1.0, 1.0, 1.0, 0.0]) + strengths * signs,
        grayscale=chance(views.grayscale),
        sigma=torch.where(chance(views.blur[view]), sigma, 0),
        solarise=chance(views.solarise[view]),
    )


def draw_boxes(scale: tuple[float, float], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Boxes [count, 4] (top, left, height, width) distributed as torchvision's RandomResizedCrop of a square image."""
    unit = torch.rand(2, count, ATTEMPTS, generator=generator, dtype=torch.float64)
    area = size**2 * (scale[0] + (scale[1] - scale[0]) * unit[0])
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = torch.exp(low + (high - low) * unit[1])
    height, width = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    valid = (width > 0) & (width <= size) & (height > 0) & (height <= size)
    first = valid.int().argmax(dim=1, keepdim=True)
    found = valid.gather(1, first)
    # torchvision falls back on the largest centred crop of a permitted shape: of a square, all of it.
    sides = [torch.where(found, side.gather(1, first), size) for side in (height, width)]
    extent = torch.cat(sides, dim=1)  # [count, 2]
    corner = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * (size - extent + 1)).floor()
    return torch.cat([corner, extent], dim=1).long()


def augment(images: Tensor, params: ViewParams, size: int) -> Tensor:
    """One view: uint8 [B, C, H, W], C = 1 or 3 -> float32 [B, C, size, size] in [0, 1].

    With one channel saturation, hue and grayscale change nothing.
    """
    view = pixels.crop_resize(images / 255, params.boxes, size, params.flip)
    for place in range(len(JITTER)):
        for which, adjust in enumerate(JITTER):
            chosen = (params.jitter & (params.order[:, place] == which)).nonzero()[:, 0]
            view[chosen] = adjust(view[chosen], params.amounts[chosen, which])
    view[params.grayscale] = pixels.grey(view[params.grayscale]).expand(-1, view.shape[1], -1, -1)
    blurred = params.sigma > 0
    view[blurred] = pixels.gaussian_blur(view[blurred], params.sigma[blurred])
    view[params.solarise] = pixels.solarise(view[params.solarise])
    return view.clamp_(0, 1)
