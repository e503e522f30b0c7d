"""What the command lines of all programs have in common: errors in words with an exit code, and options of the same name.

Nothing here imports more than click, so that ``--help`` is quick on a small device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lwfed.errors import LwfedError, hide_tokens

if TYPE_CHECKING:
    from lwfed.transport.address import BrokerAddress
    from lwfed.transport.base import Transport

Command = TypeVar("Command", bound=Callable[..., Any])


class Program(click.Group):
    """A group of commands in which an LwfedError ends as ``error: ...`` on stderr and the exit code of its class.

    Commands are listed in the order in which they were added. No error repeats a token.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = hide_tokens(error.message)  # type: ignore[misc]
            raise
        except LwfedError as error:
            with suppress(OSError):  # nobody listens: the code says it too
                click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@dataclass(frozen=True)
class Connection:
    """How to be let in by a broker: the values of `connection_options`."""

    username: str | None = None
    password_file: Path | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    insecure: bool = False

    def transport(self, address: BrokerAddress) -> Transport:
        """A transport to `address`, not yet open.

        Raises ConfigError for credentials or TLS files that cannot be used, and for a way to another machine that is not
        protected, unless that is wanted.
        """
        from lwfed.errors import ConfigError
        from lwfed.transport.address import TlsFiles, read_credentials
        from lwfed.transport.mqtt import MqttTransport

        if not (address.tls or address.loopback or self.insecure):
            raise ConfigError(
                f"{address} is another machine, and without TLS anybody on the way can read, forge and take over: "
                "use mqtts://, or say that this network may be trusted with --insecure"
            )
        credentials = read_credentials(address, self.username, self.password_file, os.environ)
        if not address.tls and (self.ca or self.cert or self.key):
            raise ConfigError(f"--ca, --cert and --key are for TLS, and {address} is none: write mqtts://")
        return MqttTransport(address, credentials, TlsFiles(self.ca, self.cert, self.key) if address.tls else None)


def connection_options(command: Command) -> Command:
    """Add the options of a connection; the command gets them as one argument `connection`: Connection."""

    @wraps(command)
    def call(*args: Any, **options: Any) -> Any:
        names = Connection.__dataclass_fields__
        connection = Connection(**{name: options.pop(name) for name in names})
        return command(*args, **options, connection=connection)

    path = click.Path(path_type=Path)
    for option in (
        click.option("--insecure", is_flag=True, help="Allow mqtt://, without TLS, to another machine: only on a network you trust."),
        click.option("--key", type=path, help="Private key of --cert (PEM)."),
        click.option("--cert", type=path, help="Certificate that identifies this side to the broker (PEM)."),
        click.option("--ca", type=path, help="Authority to trust for mqtts:// (PEM); default: the system's."),
        click.option("--password-file", type=path, help="File with the password in its first line; or set LWFED_MQTT_PASSWORD."),
        click.option("--username", help="User name at the broker."),
    ):
        call = option(call)
    return call  # type: ignore[return-value]


def setting_option(command: Command) -> Command:
    """Add ``--set KEY=VALUE``, as often as wanted; the command gets `settings`: tuple[str, ...]."""
    option = click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one key of the configuration; repeatable.")
    return option(command)


def database_option(command: Command) -> Command:
    """Add ``--database``; the command gets `database`: str | None, the address of a server's records."""
    text = "A PostgreSQL database, postgresql://USER@HOST/NAME; or set LWFED_DATABASE. Default: an SQLite file in the run's folder."
    return click.option("--database", envvar="LWFED_DATABASE", metavar="URL", help=text)(command)


def json_option(command: Command) -> Command:
    """Add ``--json``; the command gets `as_json`: bool."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for other programs.")(command)


def listed(kind: Any) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]:
    """For an option of values of the click type `kind`, separated by commas; each of them counts once."""

    def convert(context: click.Context, option: click.Parameter, text: str | None) -> tuple[Any, ...] | None:
        return None if text is None else tuple(dict.fromkeys(kind.convert(part.strip(), option, context) for part in text.split(",")))

    return convert
