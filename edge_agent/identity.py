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
from lwfed.wire.records import Name, Record
from lwfed.wire.signed import Believe, verifier
from lwfed.wire.topics import Topics

FOLDER = "identity"
AUTHORITY = "authority.pem"
ENROL_ANEW = "enrol it under another name with another --state"


class Identity(Record):
    """What an enrolled device knows beside the files of its key, its certificate and the authority."""

    device: Name
    fleet: Name
    broker: str


@dataclass(frozen=True)
class Access:
    """How to reach the server and be let in."""

    address: BrokerAddress
    connection: Connection
    fleet: str = "default"
    device: str | None = None  # the name of an enrolled one

    def transport(self) -> Transport:
        """Not yet open. An enrolled device subscribes to its topics at once: one that was revoked is let in, but not to them."""
        transport = self.connection.transport(self.address)
        for filter in Topics(self.fleet).for_device(self.device) if self.device else ():
            transport.subscribe(filter)
        return transport


def find_access(url: str | None, connection: Connection, state: Path) -> Access:
    """By `url` and `connection`, and by the identity in `state` for what they leave open. Raises ConfigError and StateError.

    Whoever gives other credentials means another broker, and takes what is announced there for true. Without any the device
    keeps its name and believes its own server alone, even over plain MQTT, where its certificate is of no use.
    """
    identity = load(state)
    if url is None and identity is None:
        raise ConfigError("no address: `edge-agent join mqtts://HOST ...`, or enrol this device first: `edge-agent enrol -`")
    address = BrokerAddress.parse(url or (identity.broker if identity else ""))
    if identity is None or address.username or replace(connection, insecure=False) != Connection():
        return Access(address, connection)
    if address.tls:
        files = state / FOLDER
        connection = replace(connection, ca=files / AUTHORITY, cert=files / "certificate.pem", key=files / "key.pem")
    return Access(address, connection, identity.fleet, identity.device)


def load(state: Path) -> Identity | None:
    """The identity that is kept in `state`. Raises StateError when it cannot be read."""
    path = state / FOLDER / "identity.json"
    if not os.path.isfile(path):
        return None
    try:
        return Identity.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise StateError(f"{path} cannot be read: revoke this device, and {ENROL_ANEW}") from None


def announcement_verifier(state: Path, fleet: str) -> Believe:
    """What the device whose identity is in `state` believes: what its server has signed for that fleet. Raises StateError."""
    path = state / FOLDER / AUTHORITY
    try:
        return verifier(path.read_bytes(), fleet)
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read ({error}): revoke this device, and {ENROL_ANEW}") from None
