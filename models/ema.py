"""The target branch F_k, H_k: a moving average of the online branch (arXiv 2401.11647, Algorithm 2).

Made anew from the received weights at each local call and never sent. Frozen parameters are the same in both
branches: they are shared, not averaged, and cost no memory twice. P belongs to the online branch alone.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lwfed.models.heads import Network


class Target:
    """Target of `online`, whose frozen parameters must be frozen already."""

    def __init__(self, online: Network) -> None:
        shared = [*(tensor for tensor in online.parameters() if not tensor.requires_grad), online.predictor]
        self.network: Network = copy.deepcopy(online, {id(thing): thing for thing in shared})
        pairs = zip(self.network.parameters(), online.parameters(), strict=True)
        self._pairs = [(mine, theirs) for mine, theirs in pairs if mine is not theirs]
        for mine, _ in self._pairs:
            mine.requires_grad_(False)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """target <- mu * target + (1 - mu) * online."""
        if not self._pairs:
            return
        mine: list[Tensor] = [pair[0] for pair in self._pairs]
        torch._foreach_lerp_(mine, [pair[1] for pair in self._pairs], 1 - momentum)
