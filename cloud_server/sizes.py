"""Whether everything of a run can travel, known before anybody trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lwfed.config import RunConfig
from lwfed.errors import ConfigError
from lwfed.plan import StagePlan
from lwfed.wire.messages import MAX_BLOB_BYTES, MAX_GRAPH_BYTES, BlobRef, Run, encode
from lwfed.wire.records import MAX_COUNT, MAX_NAME, MAX_ORDINAL
from lwfed.wire.signed import SIGNATURE_BYTES
from lwfed.wire.sizes import Codec, Shapes, largest_bytes
from lwfed.wire.upload import LEAST_PACKET_BYTES, PACKET_MARGIN_BYTES, fitting_chunk_bytes, too_small

Parts = Mapping[str, Shapes]


def run_chunk_bytes(config: RunConfig, parts: Parts, packet_limit: int | None) -> int:
    """transfer.chunk_bytes, or less where a broker takes no larger packets. Raises ConfigError where the run cannot do with it.

    Stages that have other parts than `parts` are left out.
    """
    names, size = _largest_load(config, parts)
    try:
        return fitting_chunk_bytes(size, config.transfer.chunk_bytes, config.train.epochs, packet_limit)
    except ConfigError as error:
        raise ConfigError(f"{', '.join(names)}: {error}") from None


def check_announcement(config: RunConfig, packet_limit: int | None) -> None:
    """Raises ConfigError for a broker that does not take the run's largest announcement, signed and without patches."""
    needed = _announcement_bytes(config) + PACKET_MARGIN_BYTES
    if packet_limit is not None and needed > packet_limit:
        needed = max(needed, config.transfer.chunk_bytes + PACKET_MARGIN_BYTES, LEAST_PACKET_BYTES)
        raise ConfigError(f"the announcement: {too_small(packet_limit, needed)}")


def round_bytes(plan: StagePlan, codec: Codec, parts: Parts) -> tuple[int, int]:
    """(down, up): of a device in a round of the stage, at most, for one that was in the round before."""
    return sum(largest_bytes(parts[part], codec) for part in plan.downloaded), update_bytes(plan.uploaded, codec, parts)


def update_bytes(uploaded: Iterable[str], codec: Codec, parts: Parts) -> int:
    """Of an update, at most."""
    return largest_bytes({name: shape for part in uploaded for name, shape in parts[part].items()}, codec)


def _announcement_bytes(config: RunConfig) -> int:
    plans = [config.plan(stage) for stage in range(1, config.stage_count + 1)]
    blob, most = BlobRef(id="0" * 64, size=MAX_BLOB_BYTES), MAX_ORDINAL
    run = Run(
        run="0" * MAX_NAME,
        epoch=MAX_COUNT,
        seq=MAX_COUNT,
        phase="calibrating",
        stage=most,
        stages=most,
        round=most,
        rounds=most,
        config=blob,
        parts={part: blob for plan in plans for part in plan.present},
        lr_scale=0.1 + 0.2,
        paused=True,
        graphs={engine: BlobRef(id="0" * 64, size=MAX_GRAPH_BYTES) for engine in config.graphs},
    )
    return len(encode(run)) + SIGNATURE_BYTES


def _largest_load(config: RunConfig, parts: Parts) -> tuple[tuple[str, ...], int]:
    """What is largest among updates and parts of the model, which travel as one blob each; its bytes."""
    plans = [config.plan(stage) for stage in range(1, config.stage_count + 1)]
    loads: dict[tuple[str, ...], int] = {}
    for part, shapes in parts.items():
        loads[part,] = largest_bytes(shapes, "fp32")  # whole, for who joins late
    for plan in plans:
        if parts.keys() >= set(plan.uploaded):
            loads[plan.uploaded] = update_bytes(plan.uploaded, config.transfer.codec, parts)
    return max(loads.items(), key=lambda load: load[1])
