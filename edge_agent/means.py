"""How this device computes a stage: what runs the frozen layers, and how many images go through all layers at a time.

Chosen before the first step of a stage, within the memory that training may take, and then kept: int8 layers and the
rounding of a micro-batch are part of what the bits of an update depend on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import RunConfig
from lwfed.edge_agent.least import least_images
from lwfed.edge_agent.resources import MB, SHARE, own_share_bytes, resident_mb
from lwfed.errors import Unfit
from lwfed.models import fitting
from lwfed.models.allocator import give_back, let_code_go
from lwfed.models.backbones import load_encoder
from lwfed.models.local import Images
from lwfed.models.onnx_layer import NO_GRAPH
from lwfed.models.prefix import JUDGED_IMAGES, KEPT_AS, SESSIONS, Prefix, make_prefix
from lwfed.models.step import Means, Terms
from lwfed.plan import GraphEngine, PrefixEngine, StagePlan, part_of

ONNX_BYTES = 26e6  # of ONNX Runtime and its code, beside sessions; until it can be measured


@dataclass(frozen=True)
class Found:
    means: Means
    reason: str  # for people
    needs_mb: float  # what this process has to be allowed for the same plan
    features_bytes: float = 0.0  # of memory, for those of views that are used again; 0: they go to a file
    least: PrefixEngine = "torch"  # this engine or torch: which takes less, with the fewest images at a time

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
    search.check()
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

    def check(self) -> None:
        """That there is room for the weights alone, before anything is computed. Raises Unfit."""
        least = fitting.weights_bytes(self.tensors, self.plan.trained)
        room = self._memory()[1] if self._device.type == "cpu" else self._gpu_room()
        if least > room:
            raise self._explained(fitting.unfit(least, room))

    def on_gpu(self) -> Found:
        need, (held, room) = self._need("torch", fitting.CODE_BYTES), self._memory()
        size = self._micro_batch(need, self._gpu_room())
        takes = need.of(size) if self._shares_memory else 0.0
        return self._found(Means(None, size), "a GPU, on which torch runs all layers", held + takes, need.features, room - takes)

    def with_torch(self, reason: str, code: float | None = None) -> Found:
        """`code`: bytes of libraries that training maps, where they have been measured."""
        need = self._need("torch", self._code("torch") if code is None else code)
        if self.config.train.micro_batch is not None and self.config.model.backbone in CONVOLUTIONAL:
            reason += "; batches whole, for this backbone has statistics of the batch"
        return self._on_cpu(need, None, reason)

    def with_onnx(self, graphs: Mapping[GraphEngine, Path]) -> Found:
        """Where it has room, and a trial finds it fit; as torch does otherwise."""
        wanted = self.config.train.prefix
        candidates = [engine for engine in graphs if wanted in ("auto", engine)]
        if not candidates:
            return self.with_torch(NO_GRAPH)
        code = self._code("onnx_int8" if "onnx_int8" in candidates else "torch")
        engines: Sequence[PrefixEngine] = ["torch", *candidates] if wanted == "auto" else candidates
        expected = {engine: self._need(engine, code + ONNX_BYTES + SESSIONS.get(engine, 0.0) * self._frozen_bytes) for engine in engines}
        held, room = self._memory()
        over = {engine: self._over(need, room) for engine, need in expected.items()}
        fit = {engine: graphs[engine] for engine in candidates if over[engine] <= 0}
        refused = [self._too_much(engine, over[engine]) for engine in (engines if fit else candidates) if over[engine] > 0]
        if refused and not fit:
            return self._instead("; ".join(refused), code)
        sizes = {engine: self._micro_batch(expected[engine], room) for engine in fit}
        size = min(sizes.values())
        trial, encoder = self._tokens(size), load_encoder(self.config.model, self.tensors)
        torch_fits = over.get("torch", 0.0) <= 0
        chosen = make_prefix(encoder, len(self.plan.frozen_layers), wanted, fit, trial, size, torch_fits)
        del encoder
        engine, reason = chosen.prefix.engine, "; ".join([chosen.reason, *refused])
        if engine != "torch":
            need = self._need(engine, code + fitting.mapped_by(partial(chosen.prefix, trial[:size], ())))
            if (more := self._over(need, self._memory()[1])) <= 0:
                found = self._on_cpu(need, chosen.prefix, reason, held + expected[engine].of(sizes[engine]), judged=size)
                return replace(found, least=engine if self._least(need) < self._least(self._need("torch", code)) else "torch")
            reason = self._too_much(engine, more)
        del chosen, trial
        return self._instead(reason, code)

    def _instead(self, reason: str, code: float) -> Found:
        """With torch, since `reason` speaks against all else."""
        try:
            return self.with_torch(reason, code)
        except Unfit as error:
            raise Unfit(f"{error}; {reason}") from None

    @property
    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def _batch_size(self) -> int:
        return min(self.config.train.batch_size, len(self.images))

    @property
    def _terms(self) -> Terms:
        return Terms(self.config.alignment, self.config.train.proximal)

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

    @property
    def _frozen_bytes(self) -> float:
        """Of the weights of the frozen layers in float32."""
        return 4.0 * sum(tensor.numel() for name, tensor in self.tensors.items() if part_of(name) in self.plan.frozen_layers)

    def _gpu_room(self) -> float:
        free = float(torch.cuda.mem_get_info(self._device)[0])
        return min(free, self._memory()[1]) if self._shares_memory else free

    @property
    def _shares_memory(self) -> bool:
        """Its GPU has main memory, as a Jetson's."""
        return bool(torch.cuda.get_device_properties(self._device).is_integrated)

    def _memory(self) -> tuple[float, float]:
        """Bytes that this process cannot do without, and that it may take beside them."""
        give_back()
        let_code_go()
        held = resident_mb() * MB
        return held, own_share_bytes() if self.budget_mb is None else self.budget_mb * MB - held

    def _need(self, engine: PrefixEngine, beside: float) -> fitting.Need:
        """With frozen layers by `engine`; libraries, and what the engine is yet to take, are `beside`."""
        kept_as, parts = KEPT_AS.get(engine, torch.float32), self.plan.trained
        need = fitting.measure(self.config, self.tensors, parts, self._terms, self._batch_size, kept_as, self._drawn)
        return need.plus(beside, freed=0.0 if engine == "torch" else self._frozen_bytes)

    def _code(self, engine: PrefixEngine) -> float:
        """Bytes of libraries that training maps, measured. Raises Unfit where not even training by `engine` would have room."""
        self._micro_batch(self._need(engine, fitting.CODE_BYTES), self._memory()[1])
        return fitting.code_bytes(self.config, self.tensors, self.plan.trained, self._terms)

    def _micro_batch(self, need: fitting.Need, room: float) -> int:
        try:
            return fitting.micro_batch(self.config, need, self._device, room)
        except Unfit as error:
            raise self._explained(error) from None

    def _explained(self, error: Unfit) -> Unfit:
        way = "free memory" if self.budget_mb is None else "raise the memory budget"
        share = f" ({SHARE * 100:.0f} % of what is available, without a memory budget)"
        where = share if self.budget_mb is None and self._device.type == "cpu" else ""
        return Unfit(f"stage {self.stage}: {error}{where}; {way} or lower train.batch_size")

    def _over(self, need: fitting.Need, room: float) -> float:
        """Bytes of what is needed at least that have no room."""
        return need.of(fitting.sizes(self.config, need, self._device)[-1]) - room

    def _too_much(self, engine: PrefixEngine, over: float) -> str:
        return f"{engine} would take {math.ceil(over / MB)} MB more than {'there is' if self.budget_mb is None else 'the budget'}"

    def _least(self, need: fitting.Need) -> float:
        """Bytes with the fewest images at a time that are worth it, beside what the process holds.

        What it holds by now of ONNX Runtime is left out. In stage 12 of ViT-Tiny that is 18 MB, and with them int8 would be taken from
        batches of 256 on; as measured it takes no more than torch from 64 on, and so it does by this reckoning.
        """
        size = fitting.sizes(self.config, need, self._device)[0]
        return need.of(least_images(self.config, size, self._batch_size))

    def _on_cpu(self, need: fitting.Need, prefix: Prefix | None, reason: str, least: float = 0.0, judged: float = math.inf) -> Found:
        """`least`: bytes without which this would not have been tried; `judged`: images at a time by which `prefix` was found fit."""
        held, room = self._memory()
        size = int(min(self._micro_batch(need, room), judged))
        takes = need.of(size)
        return self._found(Means(prefix, size), reason, max(least, held + takes), need.features, room - takes)

    def _found(self, means: Means, reason: str, needs: float, features: float, left: float) -> Found:
        """`needs`: bytes of this process, but for `features`, which have room in what is `left`."""
        kept = features if self._in_memory and features <= left else 0.0
        if self._in_memory and not kept:
            reason += "; features in a file, for memory has no room for them"
        return Found(means, reason, (needs + kept) / MB, kept)

    @torch.no_grad()
    def _tokens(self, micro_batch: int) -> Tensor:
        """What the stem gives for some images, evenly from among all, for neighbours are often alike."""
        encoder, count = load_encoder(self.config.model, self.tensors), min(max(micro_batch, JUDGED_IMAGES), len(self.images))
        some = torch.from_numpy(np.array(self.images[np.linspace(0, len(self.images) - 1, count).astype(int)]))
        return torch.cat([encoder.stem(piece / 255) for piece in torch.split(some, micro_batch)])
