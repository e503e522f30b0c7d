"""Where a broker is and how to be let in, as a person writes it."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lwfed.errors import ConfigError, hide_tokens

PORTS = {"mqtt": 1883, "mqtts": 8883}
PASSWORD_VARIABLE = "LWFED_MQTT_PASSWORD"  # noqa: S105 - the name of a variable
_FORM = "write mqtt://[user@]host[:port], or mqtts:// for TLS"


@dataclass(frozen=True)
class BrokerAddress:
    host: str
    port: int
    tls: bool = False
    username: str | None = None

    @classmethod
    def parse(cls, url: str) -> BrokerAddress:
        """Raises ConfigError that says how an address is written."""
        if hide_tokens(url) != url:
            raise ConfigError("this is a token, not the address of a broker: `edge-agent enrol -` takes it, from its standard input")
        try:
            parts = urlsplit(url.strip())
        except ValueError:
            raise ConfigError(f"{_hidden(url)!r} is not the address of an MQTT broker: {_FORM}") from None
        if parts.scheme not in PORTS or not url.strip().startswith(f"{parts.scheme}://"):
            raise ConfigError(f"{_hidden(url)!r} is not the address of an MQTT broker: {_FORM}")
        if parts.password is not None:
            raise ConfigError(
                f"a password in an address can be read by everybody on this machine: use --password-file or {PASSWORD_VARIABLE}"
            )
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ConfigError(f"{_hidden(url)!r} has no valid port (1 to 65535): {_FORM}") from None
        if not host or port == 0 or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigError(f"{_hidden(url)!r} is not the address of an MQTT broker: {_FORM}")
        username = unquote(parts.username) if parts.username else None
        return cls(host, port or PORTS[parts.scheme], parts.scheme == "mqtts", username)

    @property
    def loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


@dataclass(frozen=True)
class Credentials:
    username: str | None = None
    password: str | None = field(default=None, repr=False)


def read_credentials(address: BrokerAddress, username: str | None, password_file: Path | None, environ: Mapping[str, str]) -> Credentials:
    """Name from the option or the address; password from the file's first line or the environment. Raises ConfigError."""
    name = username or address.username
    password = environ.get(PASSWORD_VARIABLE)
    if password_file is not None:
        try:
            password = password_file.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the password in {password_file}: {error}") from None
    if password is not None and name is None:
        raise ConfigError("there is a password but no user name: give --username as well")
    return Credentials(name, password)


@dataclass(frozen=True)
class TlsFiles:
    """Files of PEM. Without `ca` the system's authorities are trusted; `cert` (and `key`) identify this side."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises ConfigError for files that cannot be used."""
        if self.key is not None and self.cert is None:
            raise ConfigError("there is a key but no certificate: give --cert as well")
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(path) for path in (self.ca, self.cert, self.key) if path)
            raise ConfigError(f"cannot use {files} for TLS: {error.strerror or error}") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def _hidden(url: str) -> str:
    """The address as it may be shown: without what stands between a colon and an at sign."""
    before, at, host = url.rpartition("@")
    scheme, slashes, user = before.rpartition("//")
    return f"{scheme}{slashes}{user.split(':')[0]}{at}{host}"
