"""An update as a device offers it, and what both ends of an upload say."""

from __future__ import annotations

from random import Random

from lwfed.blobs import BlobStore
from lwfed.wire.commands import Reconnect, Send
from lwfed.wire.messages import Offer, decode
from lwfed.wire.report import Traffic
from lwfed.wire.topics import FromDevice, ToDevice, Topics, UpdateChunk
from lwfed.wire.upload import contribution_id

from .samples import REPORT

TOPICS = Topics("f")
CONTENT = Random(0).randbytes(6 * 1024)
TRAFFIC = Traffic(down=10, up=20)


def make_offer(store: BlobStore, device: str = "d1", content: bytes = CONTENT, round: int = 1) -> Offer:
    manifest = store.manifest(store.put(content).id, 1024)
    contribution = contribution_id("run", 1, round, device, manifest.blob.id)
    return Offer(contribution=contribution, run="run", stage=1, round=round, participant=1, manifest=manifest, report=REPORT)


def said(commands, table):
    """The messages in `commands`, and the indices of chunks."""
    found = []
    for command in commands:
        if isinstance(command, Reconnect):
            found.append(command)
            continue
        assert isinstance(command, Send)
        match TOPICS.parse(command.topic):
            case FromDevice(_, kind) | ToDevice(_, kind):
                found.append(decode(table[kind], command.payload))
            case UpdateChunk(_, _, _, index):
                found.append(index)
    return found
