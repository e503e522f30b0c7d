"""Projection head H and prediction head P, and the network F + H + P that a device trains.

Both are MLPs of Linear without bias, BatchNorm and ReLU whose last BatchNorm has no affine parameters (MoCo v3's recipe
for ViT); H has three layers, P two (arXiv 2401.11647, section 4.1). BatchNorm keeps no running statistics: the heads
work in training only and always on the full batch, so running means would never be read, and a federated mean of
them, taken over uneven devices, would describe no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lwfed.config import RunConfig
from lwfed.models.encoder import Encoder, layer_count


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """A head: [B, widths[0]] -> [B, widths[-1]], B >= 2."""
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for index in range(last + 1):
        layers.append(nn.Linear(widths[index], widths[index + 1], bias=False))
        layers.append(nn.BatchNorm1d(widths[index + 1], affine=index < last, track_running_stats=False))
        if index < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Network(Encoder):
    """Encoder with both heads. Tensor names are the encoder's, and ``projector.N``, ``predictor.N``."""

    def __init__(self, config: RunConfig, layers: int) -> None:
        super().__init__(config.model, layers)
        hidden, out = config.ssl.hidden_dim, config.ssl.output_dim
        self.projector = mlp([config.model.width, hidden, hidden, out])
        self.predictor = mlp([out, hidden, out])

    def project(self, features: Tensor) -> Tensor:
        """H: [B, width] -> [B, output_dim]."""
        out: Tensor = self.projector(features)
        return out

    def predict(self, features: Tensor) -> Tensor:
        """P(H(features)): [B, width] -> [B, output_dim]."""
        out: Tensor = self.predictor(self.projector(features))
        return out


def load_network(config: RunConfig, tensors: Mapping[str, Tensor]) -> Network:
    """The network that `tensors` hold; it shares their memory.

    Raises RuntimeError that names what is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        network = Network(config, layer_count(tensors))
    network.load_state_dict(dict(tensors), assign=True)
    return network
