"""What the formulas of `lwfed.models.cost` say of a row, without measuring."""

from __future__ import annotations

from lwfed.config import RunConfig
from lwfed.models import cost
from lwfed.models.measure import measure
from lwfed.models.shapes import shapes
from lwfed.models.ssl import METHODS
from lwfed.wire.sizes import packed_bytes

FUSED = 1.25  # of what the formula says ours takes: published code keeps more; for estimates


def macs(config: RunConfig, stage: int) -> float:
    """Multiply-accumulates of one optimiser step of ours."""
    plan = config.plan(stage)
    return cost.true_macs(config, plan, measure(config)) * config.train.batch_size


def published_macs(config: RunConfig, stage: int) -> float:
    """The same of the baseline: no second forward pass, and the target branch runs through frozen layers too."""
    plan = config.plan(stage)
    parts = measure(config).parts
    again = METHODS[config.ssl.method].view_count * sum(parts[part].forward for part in plan.frozen)
    return macs(whole(config), stage) + again * config.train.batch_size


def bytes_moved(config: RunConfig, stage: int) -> int:
    """Down and up in one round as `transfer.codec` sends them, without headers; int8 before it is compressed."""
    plan, codec = config.plan(stage), config.transfer.codec
    if codec != "fp32":
        return sum(packed_bytes(shapes(config, parts), codec) for parts in (plan.downloaded, plan.uploaded))
    return 4 * sum(cost.count(measure(config), parts) for parts in (plan.downloaded, plan.uploaded))


def training_mb(config: RunConfig, stage: int) -> float:
    """Estimate of what training takes beside libraries."""
    plan = config.plan(stage)
    return FUSED * cost.memory_bytes(config, plan, measure(config)) / 1e6


def whole(config: RunConfig, micro_batch: int | None = None) -> RunConfig:
    """`config` with whole batches, or with pieces of `micro_batch` images."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})
