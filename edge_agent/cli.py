"""``edge-agent``: what is installed on a device. ``--help`` imports click and nothing heavier."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import click

from lwfed import __version__
from lwfed.cli import Connection, Program, connection_options, json_option, listed, setting_option
from lwfed.plan import Strategy
from lwfed.signals import on_signals


class Folder(click.Path):
    """A path; an empty one, which an unset variable gives, would mean the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value, param, ctx) if value else self.fail("is empty", param, ctx)


def megabytes(size: str) -> float:
    """MB of 10^6 bytes, of a text like 600, 600MB or 1.5GB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|)\s*", size, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise click.BadParameter(f"{size!r} is no size: write it like 600MB or 1.5GB")
    return float(found[1]) * (1000 if found[2].upper() == "GB" else 1)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Train on this device's images, which never leave it, together with others."""


@main.command()
@click.argument("url", required=False)
@click.option(
    "--data", required=True, metavar="FOLDER|FILE|NAME", help="A folder of images, an .npz file, or a data set: digits, cifar10, ..."
)
@click.option("--fleet", help="As on the server. Default: that of the enrolment, or else default.")
@click.option("--name", default="device", show_default=True, help="Tells several agents on one machine apart; each has its own state.")
@click.option("--state", type=Folder(path_type=Path), help="Folder for journal, model and decoded images.")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0.1, 86_400), default=15, show_default=True, help="Seconds to try the first connection."
)
@click.option(
    "--memory-budget",
    "budget_mb",
    type=megabytes,
    metavar="SIZE",
    help="Memory for all of the agent, e.g. 600MB or 1.5GB; else a share of what is there.",
)
@connection_options
@json_option
@click.pass_context
def join(
    context: click.Context,
    url: str | None,
    data: str,
    fleet: str | None,
    name: str,
    state: Path | None,
    wait_s: float,
    budget_mb: float | None,
    connection: Connection,
    as_json: bool,
) -> None:
    """Connect to the broker at URL (mqtt://host or mqtts://host) and train when the server asks; Ctrl-C ends it.

    An enrolled device needs no URL and is let in by its certificate.
    The first connection must succeed within --wait seconds; after that, lost connections are made anew for ever.
    """
    context.with_resource(on_signals(sys.exit))  # until the agent listens: imports and a look at the images take their time

    from lwfed.console import Console
    from lwfed.edge_agent.agent import Agent, Join
    from lwfed.edge_agent.identity import find_access
    from lwfed.edge_agent.screen import Screen
    from lwfed.errors import ConfigError
    from lwfed.locks import locked_state
    from lwfed.wire.topics import is_name

    place = state or default_state(name)
    access = find_access(url, connection, place)
    fleet = fleet or access.fleet
    for option, value in (("--fleet", fleet), ("--name", name)):
        if not is_name(value):
            raise ConfigError(f"{option} {value!r}: use 1 to 64 of a-z, 0-9 and -")
    transport = access.transport()
    screen = Screen(Console(as_json))
    with locked_state(place, "use another --name or --state"):
        Agent(Join(data, fleet, name, place, wait_s, budget_mb, access.device), transport, screen).run()


@main.command("enrol")
@click.argument("token")
@click.option("--name", default="device", show_default=True, help="As for `join`.")
@click.option("--state", type=Folder(path_type=Path), help="As for `join`.")
@click.option("--wait", "wait_s", type=click.FloatRange(0.1, 86_400), default=30, show_default=True, help="Seconds to try.")
def enrol_device(token: str, name: str, state: Path | None, wait_s: float) -> None:
    """Become the device that `cloud-server enrol` printed TOKEN for; then `join` needs no address.

    Makes a key, which stays here, and gets a certificate for it. With - the token is read from the standard input, and shows
    in no list of processes.
    """
    from lwfed.edge_agent.enrolment import enrol
    from lwfed.locks import locked_state
    from lwfed.wire.token import Token

    known = Token.parse(sys.stdin.readline() if token == "-" else token)  # noqa: S105 - standard input
    with locked_state(state or default_state(name), "end it, or use another --name or --state") as place:
        device = enrol(known, place, wait_s)
    options = ("" if name == "device" else f" --name {name}") + (f" --state {shlex.quote(str(state))}" if state else "")
    click.echo(f"enrolled as {device}; now: edge-agent join --data FOLDER{options}")


@main.command()
@click.argument("url", required=False)
@click.option("--data", metavar="FOLDER|FILE|NAME", help="Also check that these images can be read.")
@click.option("--state", type=Folder(path_type=Path), help="Folder whose disk is checked.")
@connection_options
@json_option
@click.pass_context
def doctor(context: click.Context, url: str | None, data: str | None, state: Path | None, connection: Connection, as_json: bool) -> None:
    """Check whether this device can train, and reach the broker at URL or that of its enrolment.

    Exit code 0, or 1 if something must be mended.
    """
    from lwfed.edge_agent import doctor as checks
    from lwfed.edge_agent.identity import find_access, load

    place = state or default_state("device")
    access = find_access(url, connection, place) if url or load(place) else None
    context.exit(checks.report(checks.examine(place, data, access), as_json))


@main.command()
@click.argument("config", default="base", metavar="[NAME|FILE]")
@click.option("--budget", "budget_mb", type=megabytes, metavar="MB", help="For all of the agent; default: 80 % of what is available.")
@click.option("--stages", callback=listed(click.IntRange(min=1)), metavar="1,6,12", help="Default: the first, the middle and the last.")
@click.option("--strategies", callback=listed(click.Choice(get_args(Strategy))), metavar="A,B", help="Default: the configuration's.")
@click.option("--threads", callback=listed(click.IntRange(1, 256)), metavar="1,2,4", help="Default: the configuration's.")
@click.option(
    "--limits", "limits", callback=listed(click.IntRange(min=64)), metavar="512,1000,...", help="Each under so many MB, in a control group."
)
@click.option(
    "--images", type=click.IntRange(min=2), default=5000, show_default=True, help="That this device has, for the time of an epoch."
)
@click.option(
    "--out", type=Folder(path_type=Path), default="profile-out", show_default=True, help="Folder for report.json and report.html."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@setting_option
@click.pass_context
def profile(
    context: click.Context,
    config: str,
    budget_mb: float | None,
    stages: tuple[int, ...] | None,
    strategies: tuple[Strategy, ...] | None,
    threads: tuple[int, ...] | None,
    limits: tuple[int, ...] | None,
    images: int,
    out: Path,
    as_json: bool,
    settings: tuple[str, ...],
) -> None:
    """Measure what this device can train under a configuration: memory, time and bytes, stage by stage.

    Takes minutes: it makes a few optimiser steps of each case, on images of noise, in processes of its own. Exit code 0, or 1 where the
    strategy asked for first does not fit.
    """
    context.with_resource(on_signals(lambda: sys.exit(130)))

    from lwfed.edge_agent.profiling.command import Profile, run_profile

    context.exit(run_profile(Profile(config, settings, budget_mb, stages, strategies, threads, limits, images, out, as_json)))


def default_state(name: str) -> Path:
    from lwfed.locks import state_home

    return state_home() / "edge-agent" / name


if __name__ == "__main__":
    main()
