"""How this device computes a stage: what runs the frozen layers, and how many images go through all layers at a time.

Chosen before the first step of a stage, within the memory that training may take, and then kept: int8 layers and the
rounding of a micro-batch are part of what the bits of an update depend on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.edge_agent.resources import MB, own_share_bytes
from lwfed.errors import Unfit
from lwfed.models import fitting
from lwfed.models.allocator import give_back
from lwfed.models.backbones import load_encoder
from lwfed.models.local import Images
from lwfed.models.prefix import Prefix, make_prefix
from lwfed.models.step import Means, Terms
from lwfed.plan import STEM, PrefixEngine, StagePlan, part_of

ONNX_BYTES = 60e6  # of ONNX Runtime, with sessions and a trial


@dataclass(frozen=True)
class Found:
    means: Means
    reason: str  # for people

    @property
    def engine(self) -> PrefixEngine:
        return self.means.prefix.engine if self.means.prefix else "torch"

    @property
    def fixed(self) -> dict[str, Any]:
        """What every repetition has to keep."""
        return {"prefix": self.engine, "micro_batch": self.micro_batch}

    @property
    def micro_batch(self) -> int:
        assert self.means.micro_batch is not None
        return self.means.micro_batch


def find_means(
    config: RunConfig, stage: int, tensors: Mapping[str, Tensor], images: Images, budget_mb: float | None, graphs: Path
) -> Found:
    """For training `stage` of the model `tensors` on `images`; `graphs` is a folder for those of ONNX Runtime.

    `budget_mb` is what this process may take in all; None: a share of what is available. Raises Unfit.
    """
    plan, device, pairs = config.plan(stage), next(iter(tensors.values())).device, config.train.views_per_round
    drawn = pairs * len(images) if pairs != "fresh" and plan.frozen else 0
    batch_size = min(config.train.batch_size, len(images))
    terms = Terms(config.alignment, config.train.proximal)

    def fit(prefix: Prefix | None, room: float) -> int:
        need = fitting.measure(config, tensors, plan.trained, terms, batch_size, Means(prefix), drawn)
        try:
            return fitting.micro_batch(config, need, batch_size, device, room)
        except Unfit as error:
            raise Unfit(
                f"stage {stage}: {error}; {'raise --memory-budget' if budget_mb else 'free memory'} or lower train.batch_size"
            ) from None

    if device.type != "cpu":
        return Found(Means(None, fit(None, torch.cuda.mem_get_info(device)[0])), "a GPU, on which torch runs all layers")
    room = _room(budget_mb)
    if not layers_of(plan):
        return Found(Means(None, fit(None, room)), "no layer is frozen")
    if config.train.prefix == "torch" or not _fits(fit, room - ONNX_BYTES):
        return Found(
            Means(None, fit(None, room)), "as configured" if config.train.prefix == "torch" else "too little memory for ONNX Runtime"
        )
    trial = _tokens(config, tensors, images, fit(None, math.inf))
    chosen = make_prefix(load_encoder(config.model, tensors), len(layers_of(plan)), config.model, config.train.prefix, graphs, trial)
    if chosen.prefix.engine != "torch":
        weights = 4 * sum(tensor.numel() for name, tensor in tensors.items() if part_of(name) in layers_of(plan))
        with contextlib.suppress(Unfit):
            return Found(Means(chosen.prefix, fit(chosen.prefix, _room(budget_mb) + weights)), chosen.reason)
        return Found(Means(None, fit(None, room)), f"{chosen.prefix.engine} leaves too little memory")
    return Found(Means(None, fit(None, room)), chosen.reason)


def _fits(fit: Callable[[Prefix | None, float], int], room: float) -> bool:
    try:
        return fit(None, room) > 0
    except Unfit:
        return False


def layers_of(plan: StagePlan) -> list[str]:
    """The frozen layers."""
    return [part for part in plan.frozen if part != STEM]


def _room(budget_mb: float | None) -> float:
    """Bytes that this process may take beside those that it has."""
    give_back()
    if budget_mb is None:
        return own_share_bytes()
    return budget_mb * MB - psutil.Process().memory_info().rss


@torch.no_grad()
def _tokens(config: RunConfig, tensors: Mapping[str, Tensor], images: Images, count: int) -> Tensor:
    """What the stem gives for some images."""
    some = torch.from_numpy(np.array(images[:count]))
    return load_encoder(config.model, tensors).stem(some / 255)
