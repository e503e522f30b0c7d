"""``cloud-server``: the program that gathers devices and trains with them. ``--help`` imports click and nothing heavier."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lwfed import __version__
from lwfed.cli import Connection, Program, connection_options, database_option, json_option, setting_option
from lwfed.signals import on_signals

if TYPE_CHECKING:
    from lwfed.cloud_server.registry import Registry

run_option = click.option("--state", type=click.Path(path_type=Path), help="Folder of the run. Default: the one run of this user.")
NO_SERVER = "no server is running: it is done when `cloud-server serve` is started"


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train an encoder on devices that keep their images to themselves."""


@main.command()
@click.option("--config", "name", required=True, metavar="NAME|FILE", help="A preset (`lwfed config` lists them) or a YAML file.")
@setting_option
@click.option("--state", type=click.Path(path_type=Path), help="Folder of the run, to go on with it later. Default: by the run's name.")
@database_option
@click.option(
    "--broker",
    default="auto",
    show_default=True,
    metavar="KIND|URL",
    help="auto, mosquitto or embedded: start one on this machine; or mqtt(s)://HOST of one that runs.",
)
@click.option("--port", type=click.IntRange(0, 65535), help="Of the broker started here; 0: any free one. Default: 1883.")
@click.option(
    "--listen",
    metavar="HOST[:PORT]",
    help="Let enrolled devices of other machines in, by TLS; HOST is what they call this one. Uses PORT (default: 8883) and the next.",
)
@connection_options
@click.option("--until-done", is_flag=True, help="End when the run is finished, instead of staying there for its devices.")
@json_option
@click.pass_context
def serve(
    context: click.Context,
    name: str,
    settings: tuple[str, ...],
    state: Path | None,
    database: str | None,
    broker: str,
    port: int | None,
    listen: str | None,
    connection: Connection,
    until_done: bool,
    as_json: bool,
) -> None:
    """Begin a run, or go on with it where it was left; Ctrl-C ends it and loses nothing."""
    context.with_resource(on_signals(sys.exit))  # until the server listens: imports and a look at the images take their time

    from lwfed.cloud_server.serve import Options, serve_run
    from lwfed.config import load_config
    from lwfed.console import Console
    from lwfed.locks import locked_state

    config = load_config(name, settings)
    with locked_state((state or default_folder() / config.run.name).absolute(), "use another --state") as root:
        serve_run(config, root, Options(broker, port, listen, authority_folder(), connection, until_done, database), Console(as_json))


@main.command()
@click.argument("name")
def enrol(name: str) -> None:
    """Print a token by which a device becomes NAME, once and within 24 hours: `edge-agent enrol -` there reads it.

    For the server of `serve --listen`, which may be running or not.
    """
    from lwfed.cloud_server.authority import Authority
    from lwfed.cloud_server.enrolment import invite

    with opened_registry() as registry:
        known = registry.device(name)
        click.echo(invite(Authority(authority_folder(), found=False), registry, name))
    if known is not None and known.certificate is not None:
        click.echo(f"the certificate that {name} has not come with yet is void", err=True)
    click.echo("good once, for 24 hours; on the device: edge-agent enrol -, and this line", err=True)


@main.command()
@click.argument("name")
def revoke(name: str) -> None:
    """Shut device NAME out for good: a running server ends its connection within seconds. The name is not given away again."""
    with opened_registry() as registry:
        registry.revoke(name)
    click.echo(f"{name} is revoked")


@main.command()
@click.option("--state", type=click.Path(path_type=Path), help="Folder of one run. Default: all runs of this user, or of --database.")
@database_option
@json_option
def status(state: Path | None, database: str | None, as_json: bool) -> None:
    """Where runs stand: round, devices, results; and who is invited or revoked."""
    from lwfed.cloud_server.overview import overview, overviews, runs_below
    from lwfed.cloud_server.status import Admissions

    if database and not state:
        found = overviews(database, as_json)
    else:
        admissions = None
        if authority_folder().is_dir():
            with opened_registry() as registry:
                admissions = Admissions.of(registry)
        found = [overview(root, database, admissions, as_json) for root in ([state] if state else runs_below(default_folder()))]
    click.echo(("\n" if as_json else "\n\n").join(found))


@main.command()
@run_option
@database_option
@click.option("--now", is_flag=True, help="Withdraw the round under way; it goes on later with the updates that it has.")
def pause(state: Path | None, database: str | None, now: bool) -> None:
    """Let a run begin no further round until `resume`; devices stay connected, and idle."""
    from lwfed.cloud_server.orders import Order
    from lwfed.cloud_server.overview import order

    click.echo("ordered; " + ("the server pauses the run" if order(run_folder(state), Order(do="pause", now=now), database) else NO_SERVER))


@main.command()
@run_option
@database_option
def resume(state: Path | None, database: str | None) -> None:
    """Let a run that was paused go on."""
    from lwfed.cloud_server.orders import Order
    from lwfed.cloud_server.overview import order

    click.echo("ordered; " + ("the server goes on with the run" if order(run_folder(state), Order(do="resume"), database) else NO_SERVER))


@main.command()
@run_option
@database_option
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE.safetensors")
@click.option("--stage", type=click.IntRange(min=1), help="The model at the end of this stage. Default: the newest.")
def export(state: Path | None, database: str | None, out: Path, stage: int | None) -> None:
    """Write the trained encoder, with timm's tensor names, for others to load."""
    from lwfed.cloud_server.overview import export_from

    found = export_from(run_folder(state), out, stage, database)
    click.echo(f"{out}: encoder after stage {found}")


@contextmanager
def opened_registry() -> Iterator[Registry]:
    from lwfed.cloud_server.registry import Registry
    from lwfed.errors import StateError

    if not authority_folder().is_dir():
        raise StateError("no device is enrolled here, nor can be before `cloud-server serve --listen HOST` has run once")
    with closing(Registry(authority_folder())) as registry:
        yield registry


def authority_folder() -> Path:
    """Of all runs of this user; no run can be called so."""
    return default_folder() / "_authority"


def run_folder(state: Path | None) -> Path:
    """That of `--state`, or of the one run there is."""
    from lwfed.cloud_server.overview import only_run

    return state or only_run(default_folder())


def default_folder() -> Path:
    from lwfed.locks import state_home

    return state_home() / "cloud-server"


if __name__ == "__main__":
    main()
