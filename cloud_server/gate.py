"""The way in for devices of other machines: a managed mosquitto with two TLS listeners, and who may pass it.

    PORT      for enrolled devices and the server itself: a certificate of our authority, whose name is user and client id
    PORT + 1  for enrolment: no certificate but a token, whose user reaches its own two topics and nothing else

The registry is the truth. The broker starts with all of it and is told what changes, also by `cloud-server enrol` and
`cloud-server revoke` in processes of their own: once a second the gate looks whether the registry has another revision,
and says again what the broker has not confirmed.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lwfed.cli import Connection
from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.enrolment import admit
from lwfed.cloud_server.permissions import (
    ANSWERS,
    SERVER,
    Account,
    Json,
    confirmed,
    control,
    creation,
    device_account,
    document,
    removal,
    server_account,
    token_account,
)
from lwfed.cloud_server.registry import FILE_NAME, Contact, Registry
from lwfed.errors import ConfigError, MissingDependency
from lwfed.private import write_private
from lwfed.transport.address import BrokerAddress
from lwfed.wire.commands import Command, Send
from lwfed.wire.messages import encode
from lwfed.wire.signed import signed
from lwfed.wire.topics import Topics

LOOK_EVERY_S = 1.0
LOOPBACK = "127.0.0.1"
PLUGIN = "mosquitto_dynamic_security.so"
PLUGIN_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64", "/opt/homebrew/lib")
HEED_S = 4.0  # for the broker to take an account, as of a device that is revoked; without a flood it takes milliseconds
ENROLLING_AT_ONCE = 50  # anybody may open a connection there

CONFIGURATION = """\
allow_anonymous false
plugin {plugin}
plugin_opt_config_file {folder}/permissions.json
# Of sessions that are not clean: ours are.
persistent_client_expiration 1h

listener {port}{bind}
cafile {folder}/authority.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
# Otherwise one device could throw out another by taking its client id.
use_username_as_clientid true

listener {enrolment_port}{bind}
certfile {folder}/broker.pem
keyfile {folder}/broker.key
tls_version tlsv1.2
use_username_as_clientid true
max_connections {at_once}
"""


@dataclass(frozen=True)
class Place:
    """Where to listen; `host` is what devices call this machine."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Place:
        """Of HOST[:PORT]. Raises ConfigError."""
        try:
            address = BrokerAddress.parse(f"mqtts://{text}")
        except ConfigError:
            raise ConfigError(f"--listen {text!r}: write HOST or HOST:PORT, as devices reach this machine") from None
        place = cls(address.host, address.port)
        if address.username or place.bind in ("0.0.0.0", "::"):  # noqa: S104 - refused
            raise ConfigError(f"--listen {text!r}: give the name or address that devices reach this machine by; it is in their tokens")
        if place.port == 65535:
            raise ConfigError("--listen: the port above is needed as well, for enrolment: choose a lower one")
        return place

    @property
    def bind(self) -> str:
        """An address is listened on alone, for a name all of this machine's: what it means here need not be what it means to devices."""
        if self.host == "localhost":
            return LOOPBACK
        try:
            return str(ipaddress.ip_address(self.host))
        except ValueError:
            return ""

    @property
    def ports(self) -> tuple[int, int]:
        return self.port, self.port + 1


class Gate:
    def __init__(self, folder: Path, place: Place, fleet: str, clock: Callable[[], float] = time.time) -> None:
        """`folder` holds authority and registry; `clock` gives Unix time. Raises StateError."""
        self.place, self._clock = place, clock
        self._topics = Topics(fleet)
        check_authority(folder)
        self._authority = Authority(folder, clock)
        self.registry = Registry(folder, clock)
        self.refused: Callable[[str, str | None, str], None] = lambda token, device, reason: None  # an enrolment was
        self._files: Path | None = None
        self._revision: int | None = None  # of the registry, as granted
        self._followed_s = float("inf")  # when it was granted, Unix time
        self._expires_s = float("inf")  # when the next token does
        self._granted: dict[str, Account] = {}  # as the broker is to know them
        self._unconfirmed: dict[str, set[str]] = {}  # by username: commands that the broker has not confirmed
        self._unseen: set[str] = set()  # enrolled devices that have not come yet
        self.revoked: frozenset[str] = frozenset()
        self._told_revoked: frozenset[str] = frozenset()
        self._look_at = float("-inf")
        self._heed_by: dict[str, float] = {}  # by username that is to be taken: when the broker should have confirmed it

    # The broker

    @property
    def address(self) -> BrokerAddress:
        """For the server itself."""
        return BrokerAddress(self.place.bind or LOOPBACK, self.place.port, tls=True)

    @property
    def public_address(self) -> BrokerAddress:
        """For devices."""
        return BrokerAddress(self.place.host, self.place.port, tls=True)

    def configure(self, folder: Path) -> str:
        """Write what a broker that starts now needs below `folder`; its configuration. Raises StateError, MissingDependency."""
        self._files = folder.absolute()
        self._authority.issue(folder, "broker", (self.place.host, self.address.host))
        self._authority.issue(folder, SERVER)
        write_private(folder / "authority.pem", self._authority.pem)
        self._granted, self._unconfirmed, self._heed_by = self._wanted(), {}, {}
        write_private(folder / "permissions.json", document([server_account(self._topics), *self._granted.values()]))
        port, enrolment_port = self.place.ports
        bind = f" {self.place.bind}" if self.place.bind else ""
        names = {"plugin": find_plugin(), "folder": self._files, "bind": bind, "at_once": ENROLLING_AT_ONCE}
        return CONFIGURATION.format(port=port, enrolment_port=enrolment_port, **names)

    def connection(self) -> Connection:
        """How the server itself is let in by the broker that was configured."""
        assert self._files is not None
        return Connection(ca=self._files / "authority.pem", cert=self._files / f"{SERVER}.pem", key=self._files / f"{SERVER}.key")

    def advertise(self) -> None:
        """Let tokens lead devices here, where the broker has started. Raises StateError."""
        self.registry.contact = Contact(self.place.host, self.place.port, self._topics.fleet)

    def close(self) -> None:
        self.registry.close()

    # The server; `now` is its own clock

    def sign(self, announcement: bytes) -> bytes:
        """So that devices believe it."""
        return signed(announcement, self._topics.fleet, self._authority.sign)

    @property
    def filters(self) -> tuple[str, ...]:
        return self._topics.from_all_tokens, ANSWERS

    def poll(self, now: float) -> list[Command]:
        """Make the broker's permissions those of the registry, once a second."""
        if now < self._look_at:
            return []
        self._look_at = now + LOOK_EVERY_S
        another_time = not self._followed_s <= self._clock() < self._expires_s  # also when the clock was set back
        if self.registry.revision != self._revision or another_time:
            self._follow()
        taken = self._unconfirmed.keys() - self._granted.keys()
        self._heed_by = {username: self._heed_by.get(username, now + HEED_S) for username in taken}
        return self._changes()

    def begin(self) -> None:
        """There is a new connection, over which the broker has been told nothing yet."""
        self._heed_by = {}

    def take_unheeded(self, now: float) -> bool:
        """Whether the broker does not confirm that somebody may not come in any more, as when a device floods it; once in `HEED_S`."""
        if not any(now >= by for username, by in self._heed_by.items() if username in self._unconfirmed):
            return False
        self._heed_by = dict.fromkeys(self._heed_by, now + HEED_S)
        return True

    def on_answer(self, payload: bytes) -> None:
        """Of the broker, to changes."""
        for username, command in confirmed(payload):
            missing = self._unconfirmed.get(username, set())
            missing.discard(command)
            if not missing:
                self._unconfirmed.pop(username, None)

    def next_wakeup(self) -> float:
        return self._look_at

    def answer(self, token: str, payload: bytes) -> list[Command]:
        """To what came over the topic of `token`. What the device needs to come in is granted before it hears of it."""
        admission = admit(self._authority, self.registry, token, payload, self._clock())
        if admission.refused:
            device = self.registry.of_token(token)
            self.refused(token, device.name if device else None, admission.refused)
        granted: list[Command] = []
        if admission.certificate:
            self._follow()
            granted = self._changes()
        return [*granted, Send(self._topics.to_token(token), encode(admission))]

    def seen(self, device: str) -> None:
        """A device has said something, which it can only with its certificate: its token has done its service."""
        if device in self._unseen:
            self.registry.confirm(device)
            self._unseen.discard(device)
            self._revision = None

    def newly_revoked(self) -> list[str]:
        """Devices that were revoked, each once in the life of the gate."""
        fresh = sorted(self.revoked - self._told_revoked)
        self._told_revoked = self.revoked
        return fresh

    def _follow(self) -> None:
        wanted = self._wanted()
        changed = [name for name in {**self._granted, **wanted} if self._granted.get(name) != wanted.get(name)]
        self._granted = wanted
        for username in changed:
            self._unconfirmed[username] = {change["command"] for change in self._change(username)}

    def _changes(self) -> list[Command]:
        """All that the broker has not confirmed. A username is given and taken once, so that a late answer misleads nobody."""
        return control([change for username in self._unconfirmed for change in self._change(username)])

    def _change(self, username: str) -> list[Json]:
        account = self._granted.get(username)
        return removal(username) if account is None else creation(account)

    def _wanted(self) -> dict[str, Account]:
        """By username. A token's account goes when it is used or its time is over."""
        self._revision = self.registry.revision
        devices, now_s = self.registry.devices(), self._clock()
        invited = [one for one in devices if one.may_enrol(now_s)]
        self._followed_s, self._expires_s = now_s, min((one.expires_s for one in invited), default=float("inf"))
        self.revoked = frozenset(one.name for one in devices if one.revoked_s is not None)
        self._unseen = {one.name for one in devices if one.admitted and one.joined_s is None}
        accounts = [device_account(self._topics, one.name, one.user) for one in devices if one.admitted]
        accounts += [token_account(self._topics, one.token, one.secret) for one in invited]
        return {one.username: one for one in accounts}


def check_authority(folder: Path) -> None:
    """Raises StateError where that of the devices in the registry is missing."""
    if (folder / FILE_NAME).is_file():
        with closing(Registry(folder)) as registry:
            if any(one.certificate for one in registry.devices()):
                Authority(folder, found=False)


def find_plugin() -> Path:
    """mosquitto's plugin for permissions that change. Raises MissingDependency."""
    found = (path for folder in PLUGIN_FOLDERS for pattern in (PLUGIN, f"*/{PLUGIN}") for path in Path(folder).glob(pattern))
    plugin = next(found, None)
    if plugin is None:
        raise MissingDependency(f"--listen needs mosquitto's {PLUGIN}, which Debian's package brings: `apt install mosquitto`")
    return plugin
