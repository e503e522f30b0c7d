"""One task, computed: received parts and images in, the update's tensors out. Deterministic in the run's seed.

The random streams depend on (participant, stage, round), never on the device's id or on time, so a task that is
repeated after a power cut, or on another device of the same kind with the same images, gives the same bits. With alignment
by moon they depend on the device's previous update of the stage too, which `lwfed.edge_agent.previous` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.errors import InvalidPayload
from lwfed.models.local import Images, LocalSummary, StepReport, device_task, train_local
from lwfed.models.reuse import FeatureCache, Progress, reuse
from lwfed.models.shapes import part_shapes
from lwfed.models.step import Means
from lwfed.plan import part_of
from lwfed.seeds import derive
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
) -> tuple[dict[str, wire.Array], LocalSummary]:
    """The tensors of `plan.uploaded` after the local call on the device of `tensors`, and its summary. Raises DataError and Diverged.

    `previous` are those of an earlier round of the stage, for alignment by moon; `means`, `cache` and `on_rows` are as of `train_local`.
    """
    plan, place = config.plan(stage), config.place(stage, round, lr_scale)
    seed = derive(config.run.seed, "local", participant, stage, round)
    task = device_task(config, plan, seed, place, reuse(config, plan, participant, round))
    trained, summary = train_local(config, task, tensors, images, on_step, previous, means, cache, on_rows)
    return {name: tensor.cpu().numpy() for name, tensor in trained.items() if part_of(name) in plan.uploaded}, summary
