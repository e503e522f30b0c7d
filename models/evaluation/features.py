"""What is evaluated: features of an encoder, or as a base line the pixels themselves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lwfed.models.encoder import Encoder
from lwfed.models.local import Images


@torch.no_grad()
def features(encoder: Encoder, images: Images, batch_size: int = 256) -> Tensor:
    """Features of uint8 images [N, C, H, W] -> float32 [N, width], on the CPU."""
    device = encoder.device
    batches = (encoder.features(pixels(images[i : i + batch_size]).to(device)) for i in range(0, len(images), batch_size))
    return torch.cat([batch.cpu() for batch in batches])


def raw_pixels(images: Images) -> Tensor:
    """uint8 images [N, C, H, W] -> float32 [N, C * H * W] in [0, 1]."""
    return pixels(images).flatten(1)


def pixels(images: Images) -> Tensor:
    """uint8 [N, C, H, W] -> float32 in [0, 1]."""
    chosen = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    return chosen / 255
