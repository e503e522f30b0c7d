"""Encoders by the name that the configuration gives them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import ModelSection
from lwfed.models.encoder import Encoder, layer_count


def build_encoder(model: ModelSection, layers: int) -> Encoder:
    """The first `layers` layers of `model.backbone`, weights undefined. Raises ValueError and MissingDependency."""
    if model.backbone in CONVOLUTIONAL:
        from lwfed.models.convolutional import Convolutional  # timm and torchvision only where they are wanted

        return Convolutional(model, layers)
    from lwfed.models.vit import VisionTransformer

    return VisionTransformer(model, layers)


def load_encoder(model: ModelSection, tensors: Mapping[str, Tensor]) -> Encoder:
    """The encoder that `tensors` hold, heads ignored, for inference; it shares their memory and takes no gradients.

    Raises RuntimeError that names what is missing or of another shape.
    """
    with torch.device("meta"):  # no memory, and no draw from the global generator, for weights that are replaced at once
        encoder = build_encoder(model, layer_count(tensors))
    wanted = encoder.state_dict().keys()
    encoder.load_state_dict({name: tensor for name, tensor in tensors.items() if name in wanted}, assign=True)
    return encoder.requires_grad_(False).eval()
