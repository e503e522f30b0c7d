"""Masked autoencoder (He et al., arXiv 2111.06377): the encoder sees a part of the patches, the decoder paints the others.

One view per image, cropped and flipped only: distorted colours would be what it learns to paint (section 4.1 there, table 1e).
Targets are the pixels of each hidden patch, normalised by its own mean and deviation (table 1d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.config.schema import SslSection
from lwfed.models.encoder import Encoder
from lwfed.models.ssl.method import Method
from lwfed.models.views import ViewParams, draw
from lwfed.models.vit import VisionTransformer
from lwfed.plan import DECODER

VARIANCE_FLOOR = 1e-6  # of a patch in one colour


class Mae(Method):
    """A representation is [B, 1 + width]: the loss of the sample, and its features for alignment."""

    view_count = 1
    sees_pixels = True

    def draw_views(self, config: RunConfig, count: int, generator: torch.Generator) -> tuple[ViewParams, ...]:
        view = draw(config.views, 0, count, config.model.image_size, generator)
        never = torch.zeros(count, dtype=torch.bool)
        return (replace(view, jitter=never, grayscale=never, solarise=never, sigma=torch.zeros(count)),)

    def draw_kept(self, config: RunConfig, count: int, generator: torch.Generator) -> Tensor:
        patches = (config.model.image_size // config.model.patch_size) ** 2
        visible = min(max(1, round(patches * (1 - config.ssl.mask_ratio))), patches - 1)
        return torch.rand(count, patches, generator=generator).argsort(dim=1)[:, :visible].sort(dim=1).values

    def represent(self, network: Encoder, x: Tensor, view: Tensor | None, keep: Tensor | None) -> Tensor:
        assert isinstance(network, VisionTransformer)
        assert keep is not None
        assert view is not None
        tokens = network.final_norm(x)
        painted = network.get_submodule(DECODER)(tokens[:, tokens.shape[1] - keep.shape[1] :], keep)
        patch = network.patch_embed.proj.kernel_size[0]
        losses = reconstruction(painted.to(view.dtype), normalised(patches(view, patch)), keep)
        return torch.cat([losses[:, None], network.pool(x).to(view.dtype)], dim=1)

    def project(self, network: Encoder, found: Tensor) -> Tensor:
        return found[:, 1:]

    def key(self, network: Encoder, features: Tensor) -> Tensor:
        return features

    def loss(
        self, network: Encoder, found: Sequence[Tensor], projected: Sequence[Tensor], keys: Sequence[Tensor], ssl: SslSection
    ) -> Tensor:
        return found[0][:, 0].mean()


def patches(images: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, patches, C * size * size], row by row."""
    return torch.nn.functional.unfold(images, size, stride=size).transpose(1, 2)


def normalised(pixels: Tensor) -> Tensor:
    """Each patch with mean 0 and variance 1."""
    variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
    return (pixels - mean) / (variance + VARIANCE_FLOOR).sqrt()


def reconstruction(painted: Tensor, wanted: Tensor, keep: Tensor) -> Tensor:
    """Mean squared error of each sample over its hidden patches: [B, patches, P] twice, and visible places -> [B]."""
    hidden = torch.ones(painted.shape[:2], device=painted.device).scatter(1, keep, 0.0)
    error = (painted - wanted).square().mean(dim=2)
    return (error * hidden).sum(dim=1) / hidden.sum(dim=1)
