"""Heads: projection head H and prediction head P, and the network of encoder and heads that a device trains.

H and P are MLPs of Linear without bias, BatchNorm and ReLU whose last BatchNorm has no affine parameters (MoCo v3's recipe
for ViT); H has three layers, P two (arXiv 2401.11647, section 4.1). BatchNorm keeps no running statistics: the heads
work in training only and always on the full batch, so running means would never be read, and a federated mean of
them, taken over uneven devices, would describe no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lwfed.config import RunConfig
from lwfed.models.backbones import build_encoder
from lwfed.models.encoder import Encoder, layer_count
from lwfed.models.kernels import Linear
from lwfed.plan import DECODER, HEADS, PREDICTOR, PROJECTOR


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """A head: [B, widths[0]] -> [B, widths[-1]], B >= 2."""
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for index in range(last + 1):
        layers.append(Linear(widths[index], widths[index + 1], bias=False))
        layers.append(nn.BatchNorm1d(widths[index + 1], affine=index < last, track_running_stats=False))
        if index < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def build_head(config: RunConfig, part: str) -> nn.Module:
    """The head `part`, weights undefined: H [B, width] -> [B, output_dim], P [B, output_dim] -> the same, or a decoder."""
    hidden, out = config.ssl.hidden_dim, config.ssl.output_dim
    if part == PROJECTOR:
        return mlp([config.model.width, hidden, hidden, out])
    if part == PREDICTOR:
        return mlp([out, hidden, out])
    if part == DECODER:
        from lwfed.models.decoder import Decoder

        return Decoder(config.model, config.ssl)
    raise ValueError(f"{part!r} is no head")


def build_network(config: RunConfig, layers: int) -> Encoder:
    """Encoder with the heads of the SSL method as further children; tensor names are the encoder's, and ``projector.N`` and so on."""
    network = build_encoder(config.model, layers)
    for part in HEADS[config.ssl.method]:
        network.add_module(part, build_head(config, part))
    return network


def load_network(config: RunConfig, tensors: Mapping[str, Tensor]) -> Encoder:
    """The network that `tensors` hold; it shares their memory.

    Raises RuntimeError that names what is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        network = build_network(config, layer_count(tensors))
    network.load_state_dict(dict(tensors), assign=True)
    return network


def project(network: Encoder, features: Tensor) -> Tensor:
    """H: [B, width] -> [B, output_dim]."""
    out: Tensor = network.get_submodule(PROJECTOR)(features)
    return out


def predict(network: Encoder, projections: Tensor) -> Tensor:
    """P: [B, output_dim] -> [B, output_dim]."""
    out: Tensor = network.get_submodule(PREDICTOR)(projections)
    return out
