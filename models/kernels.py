"""Matrix products of a layer through oneDNN, where torch's own choice is slow.

On x86 torch hands float32 products to MKL, which leaves half of the speed of processors that are not Intel's unused; oneDNN,
which torch brings for convolutions, does not. The rule depends on the machine alone and not on a measurement, so that equal
machines compute equal bits. Everywhere else, and for other dtypes and devices, these are torch's own functions.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@lru_cache(maxsize=1)
def library() -> str:
    """What multiplies float32 matrices on this machine's processor: "onednn" or "torch"."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    built = all(backend.is_available() for backend in (torch.backends.mkldnn, torch.backends.mkl))
    usable = built and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return "onednn" if x86 and usable and not _is_intel() else "torch"


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


class Linear(nn.Linear):
    """torch's Linear, [..., in] -> [..., out]."""

    def forward(self, x: Tensor) -> Tensor:
        if library() == "onednn" and x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            out: Tensor = _OneDnnLinear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return out
        return F.linear(x, self.weight, self.bias)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t(), None) if wants_x else None,
            _product(flat.t(), x.reshape(-1, x.shape[-1]).t(), None) if wants_weight else None,
            flat.sum(0) if wants_bias and ctx.biased else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight [out, in].T + bias."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
