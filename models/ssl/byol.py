"""BYOL (Grill et al., arXiv 2006.07733, eq. 2), with the negative cosine in place of its equivalent 2 - 2 cos."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lwfed.config.schema import SslSection
from lwfed.models.encoder import Encoder
from lwfed.models.heads import predict
from lwfed.models.ssl.method import Method


def negative_cosine(q: Tensor, k: Tensor) -> Tensor:
    """q, k [B, D] -> scalar: mean over the batch of -cos(q_i, k_i)."""
    return -F.cosine_similarity(q, k, dim=1).mean()


class Byol(Method):
    has_target = True

    def loss(
        self, network: Encoder, found: Sequence[Tensor], projected: Sequence[Tensor], keys: Sequence[Tensor], ssl: SslSection
    ) -> Tensor:
        """Of both views, each against the target's projection of the other: no negatives."""
        q1, q2 = (predict(network, one) for one in projected)
        return negative_cosine(q1, keys[1]) + negative_cosine(q2, keys[0])
