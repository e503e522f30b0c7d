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
from lwfed.models.allocator import give_back, let_code_go
from lwfed.models.backbones import load_encoder
from lwfed.models.local import Images
from lwfed.models.prefix import Prefix, make_prefix
from lwfed.models.step import Means, Terms
from lwfed.plan import GraphEngine, PrefixEngine, StagePlan, part_of

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
    search = _Search(config, stage, tensors, images, budget_mb)
    if next(iter(tensors.values())).device.type != "cpu":
        return search.on_gpu()
    if not search.plan.frozen_layers:
        return search.with_torch("no layer is frozen")
    if config.train.prefix == "torch":
        return search.with_torch("as configured")
    return search.with_onnx(graphs)


@dataclass(frozen=True)
class _Search:
    config: RunConfig
    stage: int
    tensors: Mapping[str, Tensor]
    images: Images
    budget_mb: float | None

    @property
    def plan(self) -> StagePlan:
        return self.config.plan(self.stage)

    def on_gpu(self) -> Found:
        held, room = self._memory()
        fitted = self._fit(None, torch.cuda.mem_get_info(self._device)[0], room)
        return self._found(fitted, None, "a GPU, on which torch runs all layers", held)

    def with_torch(self, reason: str) -> Found:
        held, room = self._memory()
        fitted = self._fit(None, room)
        if self.config.train.micro_batch is not None and self.config.model.backbone in CONVOLUTIONAL:
            reason += "; batches whole, for this backbone has statistics of the batch"
        return self._found(fitted, None, reason, held + fitted.takes)

    def with_onnx(self, graphs: Mapping[GraphEngine, Path]) -> Found:
        """Where it has room, and a trial finds it fit; as torch does otherwise."""
        held, room = self._memory()
        try:
            fitted = self._fit(None, room - ONNX_BYTES)
        except Unfit:
            return self.with_torch("too little memory for ONNX Runtime")
        least, layers = held + ONNX_BYTES + fitted.takes, self.plan.frozen_layers
        trial = self._tokens(fitted.micro_batch)
        chosen = make_prefix(load_encoder(self.config.model, self.tensors), len(layers), self.config.train.prefix, graphs, trial)
        del trial
        engine, reason = chosen.prefix.engine, chosen.reason
        if engine != "torch":
            weights = 4 * sum(tensor.numel() for name, tensor in self.tensors.items() if part_of(name) in layers)
            held, room = self._memory()
            with contextlib.suppress(Unfit):
                fitted = self._fit(chosen.prefix, room + weights)
                return self._found(fitted, chosen.prefix, reason, max(least, held - weights + fitted.takes))
            reason = f"{engine} leaves too little memory"
        del chosen
        return self.with_torch(reason)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def _drawn(self) -> int:
        """Pairs of views that are used again."""
        pairs = self.config.train.views_per_round
        return pairs * len(self.images) if pairs != "fresh" and self.plan.frozen else 0

    @property
    def _in_memory(self) -> bool:
        """Features may stay there."""
        train = self.config.train
        return self._drawn * train.features_mb > 0 and train.features_in == "memory"

    def _memory(self) -> tuple[float, float]:
        """Bytes that this process cannot do without, and that it may take beside them."""
        give_back()
        let_code_go()
        held = resident_mb() * MB
        return held, own_share_bytes() if self.budget_mb is None else self.budget_mb * MB - held

    def _fit(self, prefix: Prefix | None, room: float, main: float | None = None) -> _Fit:
        """Within bytes of `room`; `main` has those of main memory, where training takes others."""
        config, trained, means = self.config, self.plan.trained, Means(prefix)
        batch_size, terms = min(config.train.batch_size, len(self.images)), Terms(config.alignment, config.train.proximal)

        def choose(need: fitting.Need) -> tuple[fitting.Need, int]:
            return need, fitting.micro_batch(config, need, batch_size, self._device, room)

        try:
            if (least := fitting.weights_bytes(self.tensors, trained)) > room:
                raise fitting.unfit(least, room)
            bare = fitting.measure(config, self.tensors, trained, terms, batch_size, means, self._drawn)
            need, size = choose(bare.plus(fitting.CODE_BYTES))  # before a trial, for which there has to be room too
            if main is None:
                need, size = choose(bare.plus(fitting.code_bytes(config, self.tensors, trained, terms, means)))
        except Unfit as error:
            way = "free memory" if self.budget_mb is None else "raise the memory budget"
            raise Unfit(f"stage {self.stage}: {error}; {way} or lower train.batch_size") from None
        left = room - need.of(size) if main is None else main
        return _Fit(size, need.of(size), need.features if self._in_memory and need.features <= left else 0.0)

    def _found(self, fitted: _Fit, prefix: Prefix | None, reason: str, needs: float) -> Found:
        """`needs`: bytes of this process, but for features."""
        if self._in_memory and not fitted.features_bytes:
            reason += "; features in a file, for memory has no room for them"
        return Found(Means(prefix, fitted.micro_batch), reason, (needs + fitted.features_bytes) / MB, fitted.features_bytes)

    @torch.no_grad()
    def _tokens(self, count: int) -> Tensor:
        """What the stem gives for some images."""
        some = torch.from_numpy(np.array(self.images[:count]))
        return load_encoder(self.config.model, self.tensors).stem(some / 255)


@dataclass(frozen=True)
class _Fit:
    micro_batch: int
    takes: float  # bytes of training, without features
    features_bytes: float  # of memory; 0: they go to a file, or there are none
