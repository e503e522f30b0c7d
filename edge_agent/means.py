"""How this device computes a stage: what runs the frozen layers, and how many images go through all layers at a time.

Chosen before the first step of a stage, within the memory that training may take, and then kept: int8 layers and the
rounding of a micro-batch are part of what the bits of an update depend on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import RunConfig
from lwfed.edge_agent.resources import MB, own_share_bytes, resident_mb
from lwfed.errors import Unfit
from lwfed.models import fitting
from lwfed.models.allocator import give_back
from lwfed.models.backbones import load_encoder
from lwfed.models.local import Images
from lwfed.models.prefix import Prefix, make_prefix
from lwfed.models.step import Means, Terms
from lwfed.plan import GraphEngine, PrefixEngine, part_of

ONNX_BYTES = 60e6  # of ONNX Runtime, with sessions and a trial


@dataclass(frozen=True)
class Found:
    means: Means
    reason: str  # for people
    needs_mb: float  # what this process has to be allowed for the same plan
    features_bytes: float = 0.0  # of memory, for those of views that are used again; 0: they go to a file

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
    config: RunConfig,
    stage: int,
    tensors: Mapping[str, Tensor],
    images: Images,
    budget_mb: float | None,
    graphs: Mapping[GraphEngine, Path],
) -> Found:
    """For training `stage` of the model `tensors` on `images`; `graphs` are those that ONNX Runtime can run layers by.

    `budget_mb` is what this process may take in all; None: a share of what is available. Raises Unfit.
    """
    plan, device, pairs = config.plan(stage), next(iter(tensors.values())).device, config.train.views_per_round
    drawn = pairs * len(images) if pairs != "fresh" and plan.frozen else 0
    in_memory = drawn * config.train.features_mb > 0 and config.train.features_in == "memory"
    batch_size = min(config.train.batch_size, len(images))
    terms = Terms(config.alignment, config.train.proximal)

    def fit(prefix: Prefix | None, room: float, main: float | None = None) -> _Fit:
        """Within bytes of `room`; `main` has those of main memory, where training takes others."""
        need = fitting.measure(config, tensors, plan.trained, terms, batch_size, Means(prefix), drawn)
        try:
            size = fitting.micro_batch(config, need, batch_size, device, room)
        except Unfit as error:
            way = "free memory" if budget_mb is None else "raise --memory-budget"
            raise Unfit(f"stage {stage}: {error}; {way} or lower train.batch_size") from None
        left = room - need.of(size) if main is None else main
        return _Fit(size, need.of(size), need.features if in_memory and need.features <= left else 0.0)

    def found(fitted: _Fit, prefix: Prefix | None, reason: str, needs: float) -> Found:
        """`needs`: bytes of this process, but for features."""
        if in_memory and not fitted.features_bytes:
            reason += "; features in a file, for memory has no room for them"
        return Found(Means(prefix, fitted.micro_batch), reason, (needs + fitted.features_bytes) / MB, fitted.features_bytes)

    def with_torch(reason: str) -> Found:
        held, room = _memory(budget_mb)
        fitted = fit(None, room)
        if config.train.micro_batch is not None and config.model.backbone in CONVOLUTIONAL:
            reason += "; batches whole, for this backbone has statistics of the batch"
        return found(fitted, None, reason, held + fitted.takes)

    if device.type != "cpu":
        held, room = _memory(budget_mb)
        fitted = fit(None, torch.cuda.mem_get_info(device)[0], room)
        return found(fitted, None, "a GPU, on which torch runs all layers", held)
    if not plan.frozen_layers:
        return with_torch("no layer is frozen")
    if config.train.prefix == "torch":
        return with_torch("as configured")
    held, room = _memory(budget_mb)
    try:
        fitted = fit(None, room - ONNX_BYTES)
    except Unfit:
        return with_torch("too little memory for ONNX Runtime")
    least = held + ONNX_BYTES + fitted.takes
    trial = _tokens(config, tensors, images, fitted.micro_batch)
    chosen = make_prefix(load_encoder(config.model, tensors), len(plan.frozen_layers), config.train.prefix, graphs, trial)
    del trial
    engine, reason = chosen.prefix.engine, chosen.reason
    if engine != "torch":
        weights = 4 * sum(tensor.numel() for name, tensor in tensors.items() if part_of(name) in plan.frozen_layers)
        held, room = _memory(budget_mb)
        with contextlib.suppress(Unfit):
            fitted = fit(chosen.prefix, room + weights)
            return found(fitted, chosen.prefix, reason, max(least, held - weights + fitted.takes))
        reason = f"{engine} leaves too little memory"
    del chosen
    return with_torch(reason)


@dataclass(frozen=True)
class _Fit:
    micro_batch: int
    takes: float  # bytes of training, without features
    features_bytes: float  # of memory; 0: they go to a file, or there are none


def _memory(budget_mb: float | None) -> tuple[float, float]:
    """Bytes that this process has, and that it may take beside them."""
    give_back()
    held = resident_mb() * MB
    return held, own_share_bytes() if budget_mb is None else budget_mb * MB - held


@torch.no_grad()
def _tokens(config: RunConfig, tensors: Mapping[str, Tensor], images: Images, count: int) -> Tensor:
    """What the stem gives for some images."""
    some = torch.from_numpy(np.array(images[:count]))
    return load_encoder(config.model, tensors).stem(some / 255)
