"""Further branches of a network: the target F_k, H_k, a moving average of the online branch (arXiv 2401.11647, Algorithm 2).

A branch is made anew from the received weights at each local call and never sent. Frozen parameters are the same in all
branches: they are shared, not averaged, and cost no memory twice. P belongs to the online branch alone.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lwfed.models.encoder import Encoder
from lwfed.plan import PREDICTOR


def branch(online: Encoder) -> Encoder:
    """A copy of `online`, whose frozen parameters must be frozen already; takes no gradients."""
    predictor = [module for name, module in online.named_children() if name == PREDICTOR]
    shared = [*(tensor for tensor in online.parameters() if not tensor.requires_grad), *predictor]
    copied = copy.deepcopy(online, {id(thing): thing for thing in shared})
    mine = {id(tensor) for tensor in online.parameters()}
    for tensor in copied.parameters():
        if id(tensor) not in mine:
            tensor.requires_grad_(False)
    return copied


class Target:
    """Target branch of `online`."""

    def __init__(self, online: Encoder) -> None:
        self.network = branch(online)
        pairs = zip(self.network.parameters(), online.parameters(), strict=True)
        self._pairs = [(mine, theirs) for mine, theirs in pairs if mine is not theirs]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """target <- mu * target + (1 - mu) * online."""
        if not self._pairs:
            return
        mine: list[Tensor] = [pair[0] for pair in self._pairs]
        torch._foreach_lerp_(mine, [pair[1] for pair in self._pairs], 1 - momentum)
