"""Further branches of a network: the target F_k, H_k, a moving average of the online branch (arXiv 2401.11647, Algorithm 2).

A branch is made anew from the received weights at each local call and never sent. What is frozen is the same in all
branches: it is shared, not averaged, and costs no memory twice. P and a decoder belong to the online branch alone.

Batch norms of trained layers use the statistics of the batch in every branch. The running ones of a branch are its own,
not averaged and read by nobody.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lwfed.models.encoder import Encoder
from lwfed.plan import DECODER, PREDICTOR


def branch(online: Encoder) -> Encoder:
    """A copy of `online`, in which `freeze` has frozen what is; takes no gradients."""
    alone = [module for name, module in online.named_children() if name in (PREDICTOR, DECODER)]
    frozen = [tensor for tensor in online.parameters() if not tensor.requires_grad]
    statistics = [tensor for module in online.modules() if not module.training for tensor in module.buffers(recurse=False)]
    shared = [*frozen, *statistics, *alone]
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
