"""AdamW, bit-equal to torch.optim.AdamW(foreach=True), whose construction would import torch._dynamo: 70 MB on a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's defaults; the paper states none
NO_DECAY = ("pos_embed", "cls_token")


def decays(name: str, tensor: Tensor) -> bool:
    """Whether weight decay acts on a tensor: not on biases, norms, position embedding and class token."""
    return tensor.ndim > 1 and name not in NO_DECAY


class AdamW:
    """Optimiser of the named tensors, which it changes in place; `weight_decay` is decoupled and relative to the rate."""

    def __init__(self, tensors: Mapping[str, Tensor], weight_decay: float) -> None:
        self._weight_decay = weight_decay
        self._steps = 0
        self._tensors = list(tensors.values())
        self._decayed = [tensor for name, tensor in tensors.items() if decays(name, tensor)]
        self._means = [torch.zeros_like(tensor) for tensor in self._tensors]
        self._squares = [torch.zeros_like(tensor) for tensor in self._tensors]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step along the tensors' gradients, which are then dropped."""
        gradients = [tensor.grad for tensor in self._tensors if tensor.grad is not None]
        if len(gradients) != len(self._tensors):
            raise ValueError(f"{len(self._tensors) - len(gradients)} tensors to be optimised have no gradient")
        self._steps += 1
        if self._weight_decay and self._decayed:
            torch._foreach_mul_(self._decayed, 1 - lr * self._weight_decay)
        torch._foreach_lerp_(self._means, gradients, 1 - BETA1)
        torch._foreach_mul_(self._squares, BETA2)
        torch._foreach_addcmul_(self._squares, gradients, gradients, 1 - BETA2)
        scale = torch._foreach_sqrt(self._squares)
        torch._foreach_div_(scale, (1 - BETA2**self._steps) ** 0.5)
        torch._foreach_add_(scale, EPS)
        torch._foreach_addcdiv_(self._tensors, self._means, scale, -lr / (1 - BETA1**self._steps))
        for tensor in self._tensors:
            tensor.grad = None
