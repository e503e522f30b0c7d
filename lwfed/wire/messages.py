"""The control messages: JSON of the models below, each with the protocol's version.

A message is refused as a whole: larger than `MAX_MESSAGE_BYTES`, not JSON, another version, an unknown key, a value
out of its bounds. Bulk never travels here but as chunks of blobs, which are named by their SHA-256.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from lwfed.errors import InvalidMessage, ProtocolMismatch
from lwfed.plan import GraphEngine
from lwfed.wire.records import MAX_PROTOCOL, Amount, Count, Digest, Grown, Loss, Name, Nonce, Ordinal, Part, Ranges, Record, Text, Version
from lwfed.wire.report import Report, Traffic

PROTOCOL = 1
MAX_MESSAGE_BYTES = 128 * 1024  # AWS IoT Core's limit, the lowest of the common brokers
MAX_BLOB_BYTES = 128 * 1024 * 1024  # ten layers of ViT-Small or three of ViT-Large in one update; its manifest fits a message
MAX_CHUNKS = 1200
MIN_CHUNK_BYTES = 1024
MAX_PATCHES = 8  # of a part, from one to the next
MAX_GRAPH_BYTES = 16 * 1024  # a layer's graph takes 2 KB


class Message(Record):
    v: Annotated[int, Field(strict=True, ge=PROTOCOL, le=PROTOCOL)] = PROTOCOL  # neither true nor 1.0, which equal 1


# Blobs


class BlobRef(Record):
    id: Digest
    size: Annotated[int, Field(ge=0, le=MAX_BLOB_BYTES)]


class Manifest(Message):
    """How a blob is cut, and what each piece must hash to."""

    blob: BlobRef
    chunk_bytes: Annotated[int, Field(ge=MIN_CHUNK_BYTES, le=1_000_000)]
    digests: Annotated[tuple[Digest, ...], Field(max_length=MAX_CHUNKS)]

    @model_validator(mode="after")
    def _covers(self) -> Manifest:
        if len(self.digests) != -(-self.blob.size // self.chunk_bytes):
            raise ValueError(f"{len(self.digests)} digests for {self.blob.size} bytes in chunks of {self.chunk_bytes}")
        return self


class Want(Record):
    id: Digest
    missing: Ranges | None  # chunks; None: the manifest itself


class Need(Message):
    """Device: send me these."""

    blobs: Annotated[tuple[Want, ...], Field(max_length=256)]


class Got(Message):
    """Device: so many chunks of blobs have come since it last said so, wanted or not."""

    chunks: Ordinal


# The server to everybody


class ServerState(Message):
    """Read by every version: only these fields may ever be relied on."""

    online: bool
    epoch: Count  # grows with every start of the server
    protocol_min: Version = PROTOCOL
    protocol_max: Version = PROTOCOL


Phase = Literal["preparing", "waiting", "training", "aggregating", "calibrating", "evaluating", "finished", "stopped"]


class Patch(Record):
    """Differences that make of the tensors in blob `base` those of the patch that follows, or of the part."""

    base: Digest
    blob: BlobRef


def _is_small(graph: BlobRef) -> BlobRef:
    if graph.size > MAX_GRAPH_BYTES:
        raise ValueError(f"a graph of {graph.size} bytes exceeds the {MAX_GRAPH_BYTES} allowed")
    return graph


GraphRef = Annotated[BlobRef, AfterValidator(_is_small)]


class Run(Message, Grown):
    """Where the run stands. (epoch, seq) grows; a device ignores what is older than it has seen."""

    LATER = ("patches", "paused", "graphs")

    run: Name
    epoch: Count
    seq: Count
    phase: Phase
    stage: Ordinal
    stages: Ordinal
    round: Ordinal
    rounds: Ordinal  # in this stage, as planned: it may end earlier, or go on when it is repeated
    config: BlobRef
    parts: dict[Part, BlobRef]  # all of F_s with its heads; a device fetches those it does not hold
    lr_scale: Annotated[float, Field(ge=0, le=1)] = 1.0  # of this round: what plateaus have left of the learning rate
    patches: dict[Part, Annotated[tuple[Patch, ...], Field(max_length=MAX_PATCHES)]] = Field({})  # ways to parts from what they were before
    paused: bool = False  # no round begins until the operator wants it; said in phase waiting, the tasks of this round are withdrawn
    graphs: dict[GraphEngine, GraphRef] = Field({})  # of one layer, without weights, for the frozen layers of this stage

    @property
    def over(self) -> bool:
        return self.phase in ("finished", "stopped")


# The server to one device


class Task(Message):
    """Train in this round, as this participant. Sent again whenever the device greets and still owes its update."""

    run: Name
    stage: Ordinal
    round: Ordinal
    participant: Annotated[int, Field(ge=0, le=1_000_000)]


class Grant(Message):
    contribution: Name
    worker: Name
    missing: Ranges
    window: Annotated[int, Field(ge=1, le=64)]


class Wait(Message):
    contribution: Name
    retry_s: Annotated[float, Field(ge=0, le=3600)]


class Miss(Message):
    contribution: Name
    missing: Ranges


class Done(Message):
    """The update is on the server's disk; the device may forget it."""

    contribution: Name


class Challenge(Message):
    """Another start of this device is the one that is believed in: whoever hears of it and is there greets with its nonce."""

    rival: Nonce


RefuseCode = Literal["stale", "not_chosen", "too_large", "digest", "content", "not_finite", "version", "identity"]


class Refuse(Message):
    contribution: Name | None
    code: RefuseCode
    reason: Text


# A device to the server

DeviceState = Literal["ready", "training", "lost", "stopped"]


class Start(Record):
    """Which start of an agent speaks."""

    boot: Count  # grows with every start, so that a late last will of an older one is ignored
    nonce: Nonce  # of this process alone, where the count was copied or put back with the rest of its state


class State(Message):
    state: DeviceState
    start: Start


class Hello(Message):
    start: Start
    rival: Nonce | None = None  # of the challenge that this answers
    lwfed: Text
    python: Text
    torch: Text | None
    machine: Text
    cores: Ordinal
    memory_mb: Amount
    images: Count
    source: Text


class Beat(Message):
    """Progress of the training, a few times a minute."""

    run: Name
    stage: Ordinal
    round: Ordinal
    epoch: Count
    epochs: Ordinal
    step: Count
    steps: Ordinal
    loss: Loss
    rss_mb: Amount


class Offer(Message):
    contribution: Name
    run: Name
    stage: Ordinal
    round: Ordinal
    participant: Annotated[int, Field(ge=0, le=1_000_000)]
    manifest: Manifest
    report: Report


class Fin(Message):
    contribution: Name
    traffic: Traffic


FailCode = Literal["data", "memory", "unfit", "diverged", "worker", "config"]


class Fail(Message, Grown):
    """The device cannot train in this round; the round goes on without it."""

    LATER = ("attempt",)

    run: Name
    stage: Ordinal
    round: Ordinal
    code: FailCode
    reason: Text
    attempt: Ordinal = 1  # at this round, as the device counts those that failed: what arrives twice counts once


UP: dict[str, type[Message]] = {
    "state": State,
    "hello": Hello,
    "beat": Beat,
    "need": Need,
    "got": Got,
    "offer": Offer,
    "fin": Fin,
    "fail": Fail,
}
DOWN: dict[str, type[Message]] = {
    "task": Task,
    "manifest": Manifest,
    "grant": Grant,
    "wait": Wait,
    "miss": Miss,
    "done": Done,
    "refuse": Refuse,
    "challenge": Challenge,
}
KINDS: dict[type[Message], str] = {model: kind for table in (UP, DOWN) for kind, model in table.items()}

AnyMessage = TypeVar("AnyMessage", bound=Message)


def encode(message: Message) -> bytes:
    return message.model_dump_json().encode()


def decode(model: type[AnyMessage], payload: bytes) -> AnyMessage:
    """The message in `payload`; raises InvalidMessage, or ProtocolMismatch where it is of another version."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise InvalidMessage(f"{model.__name__} of {len(payload)} bytes exceeds the {MAX_MESSAGE_BYTES} allowed")
    try:
        return model.model_validate_json(payload)
    except ValidationError as error:
        raise _objection(model, payload, error) from None


def _objection(model: type[Message], payload: bytes, error: ValidationError) -> InvalidMessage | ProtocolMismatch:
    try:
        data: Any = json.loads(payload)
    except (ValueError, RecursionError):
        return InvalidMessage(f"{model.__name__} is no JSON")
    version = data.get("v", PROTOCOL) if isinstance(data, dict) else PROTOCOL
    if type(version) is not int or not 1 <= version <= MAX_PROTOCOL:
        return InvalidMessage(f"{model.__name__}: v is no version of the protocol")
    if version != PROTOCOL and model is not ServerState:
        return ProtocolMismatch(f"{model.__name__} is of protocol version {version}; this is version {PROTOCOL}: {UPGRADE}")
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(level) for level in first["loc"])
    return InvalidMessage(f"{model.__name__}: {place}: {first['msg']}")


UPGRADE = "upgrade the older side with `pip install --upgrade lwfed`"


def decode_server_state(payload: bytes) -> ServerState:
    """The server's state, whatever its version; unknown fields are dropped. Raises InvalidMessage."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise InvalidMessage(f"the server's state is {len(payload)} bytes long")
    try:
        data = json.loads(payload)
        return ServerState.model_validate({key: data[key] for key in ServerState.model_fields if key in data and key != "v"})
    except (ValueError, RecursionError, TypeError):
        raise InvalidMessage("the server's state does not parse") from None


def speaks_our_version(state: ServerState) -> bool:
    return state.protocol_min <= PROTOCOL <= state.protocol_max
