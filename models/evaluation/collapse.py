"""Whether features still tell images apart: a stage whose features are all alike has collapsed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Variety:
    spread: float  # deviation of features of unit length, mean over dimensions, times sqrt(dimensions): 1 where all directions are alike
    rank: float  # effective rank: exp(entropy of the normalised singular values) (Roy and Vetterli 2007)


def variety(features: Tensor) -> Variety:
    """Of features [N, D], N >= 2, in float64."""
    unit = F.normalize(features.double(), dim=1)
    spread = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    centred = features.double() - features.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -torch.xlogy(share, share).sum()
    return Variety(float(spread), float(entropy.exp()))


# Untrained encoders, whose features of real images are much alike, have a spread from 0.09 and an effective rank from 9; trained
# ones more. Of features that are constant but for rounding the spread is 1e-6, of such along one direction the rank 1.
LEAST = Variety(spread=0.02, rank=1.5)


def collapsed(found: Variety) -> bool:
    return found.spread < LEAST.spread or found.rank < LEAST.rank
