"""MoCo v3's loss as arXiv 2401.11647 states it (Algorithm 2 and the definition of `con`): no 2 * tau factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lwfed.config.schema import SslSection
from lwfed.models.encoder import Encoder
from lwfed.models.heads import predict
from lwfed.models.ssl.method import Method


def info_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of -log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) ), q and k L2-normalised here.

    q, k [B, D] -> scalar; row i of both stems from image i, the other rows of k are its negatives.
    """
    similarity = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature  # [B, B]
    return F.cross_entropy(similarity, torch.arange(len(q), device=q.device))


class MoCoV3(Method):
    has_target = True
    matrices = 6

    def loss(
        self, network: Encoder, found: Sequence[Tensor], projected: Sequence[Tensor], keys: Sequence[Tensor], ssl: SslSection
    ) -> Tensor:
        """con(q1, k2) + con(q2, k1): each view's query against the target's keys of the other view."""
        q1, q2 = (predict(network, one) for one in projected)
        return info_nce(q1, keys[1], ssl.temperature) + info_nce(q2, keys[0], ssl.temperature)
