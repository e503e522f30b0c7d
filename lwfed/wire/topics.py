"""All MQTT topics of the protocol, built and parsed here and nowhere else.

    lwfed/<fleet>/srv/state                    retained, last will of the server
    lwfed/<fleet>/all/run                      retained: which run, stage and round, and the blobs they consist of
    lwfed/<fleet>/blob/<id>/<index>            a chunk on its way to the devices; subscribed to only while needed
    lwfed/<fleet>/d/<device>/up/<kind>         a device's message to the server; `state` is retained and its last will
    lwfed/<fleet>/d/<device>/up/<worker>/<contribution>/<index>    a chunk of its update
    lwfed/<fleet>/d/<device>/dn/<kind>         the server's message to one device
    lwfed/<fleet>/d/<device>/dn/<id>/<index>   a chunk that few others lack
    lwfed/<fleet>/enrol/<token>/up             a device that has a token and no certificate yet asks for one
    lwfed/<fleet>/enrol/<token>/dn             the answer

At most seven slashes and no dots, which AWS IoT and RabbitMQ need. Nothing but the three states is retained
by us, so there is nothing to clean up after a crash.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ROOT = "lwfed"
_NAME = re.compile(r"[a-z0-9-]{1,64}")
_INDEX = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class ServerState:
    pass


@dataclass(frozen=True)
class RunTopic:
    pass


@dataclass(frozen=True)
class BlobChunk:
    blob: str
    index: int
    device: str | None = None  # None: to all who need the blob


@dataclass(frozen=True)
class FromDevice:
    device: str
    kind: str


@dataclass(frozen=True)
class UpdateChunk:
    device: str
    worker: str
    contribution: str
    index: int


@dataclass(frozen=True)
class ToDevice:
    device: str
    kind: str


@dataclass(frozen=True)
class FromToken:
    token: str


@dataclass(frozen=True)
class ToToken:
    token: str


@dataclass(frozen=True)
class Stray:
    """Below what a device may write to, and of no meaning."""

    device: str


Topic = ServerState | RunTopic | BlobChunk | FromDevice | UpdateChunk | Stray | ToDevice | FromToken | ToToken


def is_name(text: str) -> bool:
    """Whether `text` may stand in a topic: a name with a slash could write into another device's topics."""
    return _NAME.fullmatch(text) is not None


class Topics:
    """The topics of one fleet."""

    def __init__(self, fleet: str) -> None:
        self.fleet = _checked(fleet)
        self._base = f"{ROOT}/{fleet}"
        self.server_state = f"{self._base}/srv/state"
        self.run = f"{self._base}/all/run"
        self.from_all_devices = f"{self._base}/d/+/up/#"
        self.from_all_tokens = f"{self._base}/enrol/+/up"
        self.all_blobs = f"{self._base}/blob/+/+"
        self.everything = f"{self._base}/#"
        self.echo = f"{self._base}/d/_server/up/echo"  # of the server to itself, where it hears devices; no device has such a name

    def blob_chunk(self, blob: str, index: int, device: str | None = None) -> str:
        """To all who need the blob, or to `device` alone."""
        place = "blob" if device is None else f"d/{_checked(device)}/dn"
        return f"{self._base}/{place}/{_checked(blob)}/{index}"

    def blob_chunks(self, blob: str) -> str:
        """The filter for all chunks of a blob."""
        return f"{self._base}/blob/{_checked(blob)}/+"

    def from_device(self, device: str, kind: str) -> str:
        return f"{self._base}/d/{_checked(device)}/up/{_checked(kind)}"

    def update_chunk(self, device: str, worker: str, contribution: str, index: int) -> str:
        return f"{self._base}/d/{_checked(device)}/up/{_checked(worker)}/{_checked(contribution)}/{index}"

    def to_device(self, device: str, kind: str) -> str:
        return f"{self._base}/d/{_checked(device)}/dn/{_checked(kind)}"

    def for_device(self, device: str) -> tuple[str, ...]:
        """The filters that a device subscribes to as long as it is connected."""
        return self.server_state, self.run, f"{self._base}/d/{_checked(device)}/dn/#"

    def all_from_device(self, device: str) -> str:
        """The filter for all that a device may say."""
        return f"{self._base}/d/{_checked(device)}/up/#"

    def from_token(self, token: str) -> str:
        return f"{self._base}/enrol/{_checked(token)}/up"

    def to_token(self, token: str) -> str:
        return f"{self._base}/enrol/{_checked(token)}/dn"

    def parse(self, topic: str) -> Topic | None:
        """What a topic is, or None when it is none of this fleet's."""
        if not topic.startswith(self._base + "/"):
            return None
        levels = topic[len(self._base) + 1 :].split("/")
        match levels:
            case ["srv", "state"]:
                return ServerState()
            case ["all", "run"]:
                return RunTopic()
            case ["blob", blob, index] if is_name(blob) and _INDEX.fullmatch(index):
                return BlobChunk(blob, int(index))
            case ["d", device, "up", kind] if is_name(device) and is_name(kind):
                return FromDevice(device, kind)
            case ["d", device, "up", worker, contribution, index] if (
                is_name(device) and is_name(worker) and is_name(contribution) and _INDEX.fullmatch(index)
            ):
                return UpdateChunk(device, worker, contribution, int(index))
            case ["d", device, "up", *_] if is_name(device):
                return Stray(device)
            case ["d", device, "dn", kind] if is_name(device) and is_name(kind):
                return ToDevice(device, kind)
            case ["d", device, "dn", blob, index] if is_name(device) and is_name(blob) and _INDEX.fullmatch(index):
                return BlobChunk(blob, int(index), device)
            case ["enrol", token, "up"] if is_name(token):
                return FromToken(token)
            case ["enrol", token, "dn"] if is_name(token):
                return ToToken(token)
        return None


def _checked(name: str) -> str:
    if not is_name(name):
        raise ValueError(f"{name!r} cannot stand in a topic: use 1 to 64 of a-z, 0-9 and -")
    return name
