"""What a device reports of a local training: the memory that it took, its losses, and what its bits depend on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lwfed.plan import PrefixEngine
from lwfed.wire.records import Amount, Count, Grown, Loss, Ordinal, Record, Text

MAX_CURVE = 120  # readings in a memory curve


class Reading(Record):
    """Memory at one moment: of the worker (rss, uss, swap) and of the whole system (available)."""

    t_s: Amount
    rss_mb: Amount
    uss_mb: Amount
    swap_mb: Amount
    available_mb: Amount


class Accelerator(Record):
    peak_mb: Amount  # that torch's allocator held
    free_mb: Amount  # the least that the device had left, for all programs; a Jetson's memory is the system's


class Memory(Record):
    baseline_mb: Amount  # the worker after its imports, before data and model
    peak_mb: Amount
    peak_source: Literal["VmHWM", "samples"]
    curve: Annotated[tuple[Reading, ...], Field(max_length=MAX_CURVE)]
    accelerator: Accelerator | None = None  # where one computed


class Traffic(Record):
    """Bytes of MQTT packets since the device joined the run, as its transport counted them."""

    down: Count
    up: Count


class Execution(Grown):
    """What the bits of an update depend on beside its inputs; kept by every repetition of the round."""

    LATER = ("onnxruntime",)

    prefix: PrefixEngine
    micro_batch: Ordinal  # images at a time
    precision: Literal["fp32", "bf16"]
    threads: Ordinal
    torch: Text
    machine: Text
    onnxruntime: Text | None = None  # its version; None where torch runs all layers


class Report(Record):
    images: Annotated[int, Field(ge=1, lt=2**53)]  # |D_n|, the weight of the update
    skipped: Count  # files that are no readable images
    steps: Ordinal
    losses: Annotated[tuple[Loss, ...], Field(min_length=1, max_length=1000)]  # per epoch
    seconds: Amount
    memory: Memory
    execution: Execution
