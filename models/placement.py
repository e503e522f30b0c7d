"""On which device of this machine a worker computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lwfed.data.images import Pixels
from lwfed.data.kept import KeptPixels
from lwfed.errors import ConfigError


def accelerator() -> str | None:
    """What torch finds beside the processor, for records; None without."""
    return f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else None


def choose(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that `worker.device` asks for. Raises ConfigError when it is not there."""
    found = accelerator()
    if wanted == "cuda" and found is None:
        raise ConfigError(
            f"worker.device is cuda, and torch {torch.__version__} finds no CUDA device here: set it to auto or cpu, "
            "or install the torch of this machine's GPU"
        )
    return torch.device("cpu" if wanted == "cpu" or found is None else "cuda")


class AcceleratorMeter:
    """Memory of an accelerator from now on; of a processor it says nothing. MB are 10^6 bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._free = math.inf
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        self.sample()

    def sample(self) -> None:
        """To be called between steps: torch keeps the peak of its allocator, and nobody that of the device."""
        if self._device is not None:
            self._free = min(self._free, torch.cuda.mem_get_info(self._device)[0])

    def reading(self) -> dict[str, float] | None:
        """As `lwfed.wire.report.Accelerator`."""
        if self._device is None:
            return None
        self.sample()
        return {"peak_mb": round(torch.cuda.max_memory_reserved(self._device) / 1e6, 2), "free_mb": round(self._free / 1e6, 2)}


def move(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on `device`."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def move_images(pixels: Pixels | KeptPixels, device: torch.device) -> Pixels | KeptPixels | Tensor:
    """Images [N, C, H, W]: all of them on an accelerator; on the processor, where they may be in a file, as they are."""
    return pixels if device.type == "cpu" else torch.from_numpy(np.asarray(pixels)).to(device)
