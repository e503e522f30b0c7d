"""A device's identity, which enrolment gives it, and how to reach the server and be let in with it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from lwfed.cli import Connection
from lwfed.errors import ConfigError, StateError
from lwfed.transport.address import BrokerAddress
from lwfed.transport.base import Transport
from lwfed.wire.messages import Digest, Name, Record
from lwfed.wire.topics import Topics

FOLDER = "identity"


class Identity(Record):
    """What an enrolled device knows beside the files of its key, its certificate and the authority."""

    device: Name
    fleet: Name
    broker: str
    announcer: Digest | None = None  # public key that announcements are signed with; None: it was enrolled before they were


@dataclass(frozen=True)
class Access:
    """How to reach the server and be let in."""

    address: BrokerAddress
    connection: Connection
    identity: Identity | None = None  # of an enrolled device

    @property
    def fleet(self) -> str:
        return self.identity.fleet if self.identity else "default"

    def transport(self) -> Transport:
        """Not yet open. An enrolled device subscribes to its topics at once: one that was revoked is let in, but not to them."""
        transport = self.connection.transport(self.address)
        for filter in Topics(self.fleet).for_device(self.identity.device) if self.identity else ():
            transport.subscribe(filter)
        return transport


def find_access(url: str | None, connection: Connection, state: Path) -> Access:
    """By `url` and `connection`, and by the identity in `state` for what they leave open. Raises ConfigError and StateError.

    The identity is for TLS without other credentials: those who give some mean another broker.
    """
    identity = load(state)
    if url is None and identity is None:
        raise ConfigError("no address: `edge-agent join mqtts://HOST ...`, or enrol this device first: `edge-agent enrol -`")
    address = BrokerAddress.parse(url or (identity.broker if identity else ""))
    if identity is None or not address.tls or connection != Connection():
        return Access(address, connection)
    files = state / FOLDER
    ours = replace(connection, ca=files / "authority.pem", cert=files / "certificate.pem", key=files / "key.pem")
    return Access(address, ours, identity)


def load(state: Path) -> Identity | None:
    """The identity that is kept in `state`. Raises StateError when it cannot be read."""
    path = state / FOLDER / "identity.json"
    if not os.path.isfile(path):
        return None
    try:
        return Identity.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise StateError(f"{path} cannot be read: revoke this device, and enrol it under another name with another --state") from None
