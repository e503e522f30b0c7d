"""One task, computed: received parts and images in, the update's tensors out. Deterministic in the run's seed.

The random streams depend on (participant, stage, round), never on the device's id or on time, so a task that is
repeated after a power cut, or on another device of the same kind with the same images, gives the same bits. With alignment
by moon they depend on the device's previous update of the stage too, which `lwfed.edge_agent.previous` keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.errors import Diverged, InvalidPayload
from lwfed.models.local import Images, LocalSummary, StepReport, device_task, train_local
from lwfed.models.reuse import FeatureCache, Progress, reuse
from lwfed.models.shapes import part_shapes, shapes
from lwfed.models.step import Means
from lwfed.plan import part_of
from lwfed.seeds import derive
from lwfed.wire import deltas
from lwfed.wire import tensors as wire

Source = Path | bytes  # of the tensors of a part


def load_parts(config: RunConfig, stage: int, files: Mapping[str, Source], without: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of all parts of F_s with its heads; of the parts `without` only shapes, on the meta device.

    Raises InvalidPayload when files do not fit the plan.
    """
    present = config.plan(stage).present
    if set(files) != set(present):
        raise InvalidPayload(f"stage {stage} needs the parts {', '.join(present)}; the server announced {', '.join(sorted(files))}")
    loaded: dict[str, Tensor] = {}
    for part in present:
        if part in without:
            loaded |= {name: torch.empty(shape, device="meta") for name, shape in part_shapes(config, part).items()}
            continue
        arrays = wire.decode(files[part], part_shapes(config, part))
        loaded |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    return loaded


def load_update(config: RunConfig, stage: int, file: Path) -> dict[str, Tensor]:
    """The tensors of a kept update. Raises InvalidPayload where the disk has spoilt it, and OSError."""
    return {name: torch.from_numpy(array) for name, array in wire.decode(file, shapes(config, config.plan(stage).uploaded)).items()}


def patch(config: RunConfig, part: str, base: Path, patches: Iterable[Path], digest: str) -> bytes:
    """The file of `part` that `patches` make of `base`, one after another. Raises InvalidPayload unless its SHA-256 is `digest`."""
    shapes, codec = part_shapes(config, part), config.transfer.codec
    if codec == "fp32":
        raise InvalidPayload("a run whose codec is fp32 sends no patches")
    found = wire.decode(base, shapes)
    for file in patches:
        change = deltas.decode(file.read_bytes(), shapes, codec)
        found = {name: tensor + change[name] for name, tensor in found.items()}
    made = wire.encode(found)
    if hashlib.sha256(made).hexdigest() != digest:
        raise InvalidPayload(f"what was sent of {part} does not make of it what the server announced")
    return made


def encode(
    config: RunConfig,
    stage: int,
    round: int,
    participant: int,
    update: Mapping[str, wire.Array],
    received: Mapping[str, wire.Array],
    residual: Mapping[str, Tensor] | None,
) -> tuple[bytes, dict[str, wire.Array]]:
    """`update` as differences to what the device received, in the codec of the run, and what that loses, to be handed in as `residual`.

    Raises Diverged where they cannot be told, and ValueError with the codec fp32.
    """
    codec, top_k = config.transfer.codec, config.transfer.top_k
    if codec == "fp32":
        raise ValueError("fp32 sends no differences")
    missing = {} if residual is None else {name: tensor.numpy() for name, tensor in residual.items()}
    wanted = {name: tensor - received[name] + missing.get(name, np.float32(0)) for name, tensor in update.items()}
    try:
        return deltas.encode(wanted, codec, top_k, derive(config.run.seed, "update", participant, stage, round))
    except ValueError as error:
        raise Diverged(f"the update cannot be sent: {error}; lower train.lr") from None


def train(
    config: RunConfig,
    stage: int,
    round: int,
    participant: int,
    tensors: Mapping[str, Tensor],
    images: Images,
    on_step: Callable[[StepReport], None] | None = None,
    lr_scale: float = 1.0,
    previous: Mapping[str, Tensor] | None = None,
    means: Means | None = None,
    cache: FeatureCache | None = None,
    on_rows: Progress | None = None,
) -> tuple[dict[str, npt.NDArray[np.float32]], LocalSummary]:
    """The tensors of `plan.uploaded` after the local call on the device of `tensors`, and its summary. Raises DataError and Diverged.

    `previous` are those of an earlier round of the stage, for alignment by moon; `means`, `cache` and `on_rows` are as of `train_local`.
    """
    plan, place = config.plan(stage), config.place(stage, round, lr_scale)
    seed = derive(config.run.seed, "local", participant, stage, round)
    task = device_task(config, plan, seed, place, reuse(config, plan, participant, round))
    trained, summary = train_local(config, task, tensors, images, on_step, previous, means, cache, on_rows)
    return {name: tensor.cpu().numpy() for name, tensor in trained.items() if part_of(name) in plan.uploaded}, summary
