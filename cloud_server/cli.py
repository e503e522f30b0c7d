"""``cloud-server``: the program that gathers devices and trains with them. ``--help`` imports click and nothing heavier."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lwfed import __version__
from lwfed.cli import Connection, Program, connection_options, json_option, setting_option
from lwfed.signals import on_signals

NO_SERVER = "no server is running: it is done when `cloud-server serve` is started"


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train an encoder on devices that keep their images to themselves."""


@main.command()
@click.option("--config", "name", required=True, metavar="NAME|FILE", help="A preset (`lwfed config` lists them) or a YAML file.")
@setting_option
@click.option("--state", type=click.Path(path_type=Path), help="Folder of the run, to go on with it later. Default: by the run's name.")
@click.option(
    "--broker",
    default="auto",
    show_default=True,
    metavar="KIND|URL",
    help="auto, mosquitto or embedded: start one on this machine; or mqtt(s)://HOST of one that runs.",
)
@click.option("--port", type=click.IntRange(0, 65535), help="Of the broker started here; 0: any free one. Default: 1883.")
@connection_options
@click.option("--until-done", is_flag=True, help="End when the run is finished, instead of staying there for its devices.")
@json_option
@click.pass_context
def serve(
    context: click.Context,
    name: str,
    settings: tuple[str, ...],
    state: Path | None,
    broker: str,
    port: int | None,
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
        serve_run(config, root, Options(broker, port, connection, until_done), Console(as_json))


@main.command()
@click.option("--state", type=click.Path(path_type=Path), help="Folder of one run. Default: all runs of this user.")
def status(state: Path | None) -> None:
    """Where runs stand: round, devices, results."""
    from lwfed.cloud_server.overview import overview, runs_below

    for number, root in enumerate([state] if state else runs_below(default_folder())):
        click.echo(("\n" if number else "") + overview(root))


@main.command()
@click.option("--state", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--now", is_flag=True, help="Withdraw the round under way; it goes on later with the updates that it has.")
def pause(state: Path, now: bool) -> None:
    """Let a run begin no further round until `resume`; devices stay connected, and idle."""
    from lwfed.cloud_server.orders import Order
    from lwfed.cloud_server.overview import order

    click.echo("ordered; " + ("the server pauses the run" if order(state, Order(do="pause", now=now)) else NO_SERVER))


@main.command()
@click.option("--state", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
def resume(state: Path) -> None:
    """Let a run that was paused go on."""
    from lwfed.cloud_server.orders import Order
    from lwfed.cloud_server.overview import order

    click.echo("ordered; " + ("the server goes on with the run" if order(state, Order(do="resume")) else NO_SERVER))


@main.command()
@click.option("--state", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE.safetensors")
@click.option("--stage", type=click.IntRange(min=1), help="The model at the end of this stage. Default: the newest.")
def export(state: Path, out: Path, stage: int | None) -> None:
    """Write the trained encoder, with timm's tensor names, for others to load."""
    from lwfed.cloud_server.overview import export_from

    found = export_from(state, out, stage)
    click.echo(f"{out}: encoder after stage {found}")


def default_folder() -> Path:
    from lwfed.locks import state_home

    return state_home() / "cloud-server"


if __name__ == "__main__":
    main()
