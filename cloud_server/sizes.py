"""Whether everything of a run can travel, known before anybody trains."""

from __future__ import annotations

from collections.abc import Mapping

from lwfed.blobs import check_cut
from lwfed.cloud_server.course import HEADER_BYTES
from lwfed.config import RunConfig
from lwfed.errors import ConfigError, InvalidPayload

PACKET_MARGIN_BYTES = 512  # topic and headers of a packet
DIGEST_BYTES = 67  # of a chunk, as it stands in a manifest


def fitting_chunk_bytes(config: RunConfig, sizes: Mapping[str, int], packet_limit: int | None) -> int:
    """transfer.chunk_bytes, or less where a broker takes no larger packets. Raises ConfigError where the run cannot do with it.

    `sizes` are the bytes of the parts; stages that have others are left out.
    """
    wanted = config.transfer.chunk_bytes
    parts, size = _largest_load(config, sizes)
    try:
        check_cut(size, wanted)
    except InvalidPayload as error:
        raise ConfigError(f"{', '.join(parts)}: {error}") from None
    if packet_limit is None:
        return wanted
    room = packet_limit - PACKET_MARGIN_BYTES
    fitting = min(wanted, room)
    try:
        check_cut(size, fitting)
        enough = _largest_message_bytes(config, size, fitting) <= room
    except InvalidPayload:
        enough = False
    if not enough:
        needed = max(wanted, _largest_message_bytes(config, size, wanted)) + PACKET_MARGIN_BYTES
        raise ConfigError(
            f"the broker takes packets of {packet_limit} bytes at most, too few for this run: "
            f"raise its limit (mosquitto: max_packet_size) to {needed}"
        )
    return fitting


def report_bytes(config: RunConfig) -> int:
    """Of an update's offer without its manifest: a full memory curve, and the loss of each epoch."""
    return 13_000 + 24 * config.train.epochs


def _largest_message_bytes(config: RunConfig, size: int, chunk_bytes: int) -> int:
    """An offer holds a report and a manifest; nothing else that is no chunk is as large."""
    return report_bytes(config) + DIGEST_BYTES * -(-size // chunk_bytes)


def _largest_load(config: RunConfig, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """What is largest among updates and parts of the model, which travel as one blob each; its bytes."""
    plans = [config.plan(stage) for stage in range(1, config.stage_count + 1)]
    updates = [plan.uploaded for plan in plans if all(part in sizes for part in plan.uploaded)]
    loads = {parts: sum(sizes[part] for part in parts) for parts in [*updates, *((part,) for part in sizes)]}
    parts = max(loads, key=lambda parts: loads[parts])
    return parts, loads[parts] + HEADER_BYTES
