"""Whether everything of a run can travel, known before anybody trains."""

from __future__ import annotations

from collections.abc import Mapping

from lwfed.cloud_server.course import HEADER_BYTES
from lwfed.config import RunConfig
from lwfed.errors import ConfigError
from lwfed.wire.upload import fitting_chunk_bytes


def run_chunk_bytes(config: RunConfig, sizes: Mapping[str, int], packet_limit: int | None) -> int:
    """transfer.chunk_bytes, or less where a broker takes no larger packets. Raises ConfigError where the run cannot do with it.

    `sizes` are the bytes of the parts; stages that have others are left out.
    """
    parts, size = _largest_load(config, sizes)
    try:
        return fitting_chunk_bytes(size, config.transfer.chunk_bytes, config.train.epochs, packet_limit)
    except ConfigError as error:
        raise ConfigError(f"{', '.join(parts)}: {error}") from None


def _largest_load(config: RunConfig, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """What is largest among updates and parts of the model, which travel as one blob each; its bytes."""
    plans = [config.plan(stage) for stage in range(1, config.stage_count + 1)]
    updates = [plan.uploaded for plan in plans if all(part in sizes for part in plan.uploaded)]
    loads = {parts: sum(sizes[part] for part in parts) for parts in [*updates, *((part,) for part in sizes)]}
    parts = max(loads, key=lambda parts: loads[parts])
    return parts, loads[parts] + HEADER_BYTES
