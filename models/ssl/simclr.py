"""SimCLR (Chen et al., arXiv 2002.05709, eq. 1): no target branch and no P."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lwfed.config.schema import SslSection
from lwfed.models.encoder import Encoder
from lwfed.models.ssl.method import Method


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Projections [B, D] of two views -> scalar: mean over all 2 B of -log of the softmax, over the 2 B - 1 others, at its partner."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))  # [2 B, 2 B], nobody compared with itself
    partner = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(similarity, partner)


class SimClr(Method):
    matrices = 12

    def loss(
        self, network: Encoder, found: Sequence[Tensor], projected: Sequence[Tensor], keys: Sequence[Tensor], ssl: SslSection
    ) -> Tensor:
        return nt_xent(projected[0], projected[1], ssl.temperature)
