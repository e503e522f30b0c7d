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


# Real collapse, provoked on digits, had spreads of 0.0006 to 0.0048; untrained encoders, whose features of real images are
# much alike, from 0.017 (a MobileNet) and ranks from 1.9 (of width 4); trained ones from 0.20 and 13. Features that are
# constant but for rounding have a spread of 1e-6, such along one line a rank of 1.
LEAST = Variety(spread=0.005, rank=1.5)


def variety(features: Tensor) -> Variety:
    """Of features [N, D], N >= 2, in float64; of such that are not finite, none."""
    exact = features.double()
    if not bool(exact.isfinite().all()):
        return Variety(0.0, 0.0)
    unit = F.normalize(exact, dim=1)
    spread = unit.std(dim=0, correction=0).mean() * unit.shape[1] ** 0.5
    values = torch.linalg.svdvals(exact - exact.mean(dim=0))
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -torch.xlogy(share, share).sum()
    return Variety(float(spread), float(entropy.exp()))


FEWEST = 16  # images, below which nothing can be said: the rank of N features is below N


def collapsed(found: Variety) -> bool:
    return found.spread < LEAST.spread or found.rank < LEAST.rank
