"""Representation alignment: a term that keeps a device's model near the one it received (arXiv 2401.11647, v1-v3).

It compares projections of the first view. The models share the frozen prefix, so each costs one more forward of the
trained layers and the projection head, of one view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(z: Tensor, z_global: Tensor) -> Tensor:
    """1 - cos, mean over the batch; [B, D] twice -> scalar."""
    return 1 - F.cosine_similarity(z, z_global, dim=1).mean()


def moon(z: Tensor, z_global: Tensor, z_previous: Tensor, temperature: float) -> Tensor:
    """MOON (Li et al., arXiv 2103.16257, eq. 3): near the global model's, away from those of the device's previous model.

    -log( exp(cos(z, z_global) / t) / (exp(cos(z, z_global) / t) + exp(cos(z, z_previous) / t)) ), mean over the batch.
    """
    scores = torch.stack([F.cosine_similarity(z, other, dim=1) for other in (z_global, z_previous)], dim=1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(z), dtype=torch.int64, device=z.device))
