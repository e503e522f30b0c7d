"""``lwfed``: tools for people, beside the programs of device and server. ``--help`` imports click and nothing heavier."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from lwfed import __version__
from lwfed.cli import Program, database_option, json_option, listed, setting_option
from lwfed.plan import Strategy
from lwfed.tools.endings import leave, on_endings


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Layer-wise federated self-supervised learning: see it work, and prepare runs."""


@main.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default="demo-out", show_default=True, help="Folder for the results."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights, splits, batches and views.")
@click.option("--quick", is_flag=True, help="One round of one epoch per stage: shows that all works, not that it learns.")
@setting_option
@click.pass_context
def demo(context: click.Context, out: Path, seed: int, quick: bool, settings: tuple[str, ...]) -> None:
    """Train on real digits with a broker, a server and three devices, all on this machine.

    First layer by layer, then end to end for comparison; leaves report.json, report.html and report.png in --out.
    """
    context.with_resource(on_endings(leave))  # before the imports, which take their time

    from lwfed.tools.demo import run_demo

    run_demo(out, seed, quick, settings)


@main.command()
@click.argument("config", metavar="[NAME|FILE]", required=False)
@click.option(
    "--data",
    metavar="FOLDER|FILE|NAME",
    help="Images that all devices share: also an .npz file. Evaluated on too, if they are a labelled set and the configuration names none.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="simulation-out",
    show_default=True,
    help="Folder for runs and report; the same again goes on.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Probability that a chosen device fails to contribute to a round.",
)
@click.option("--seeds", callback=listed(click.IntRange(min=0)), metavar="0,1,2", help="One run for each. Default: the configuration's.")
@click.option(
    "--strategies",
    callback=listed(click.Choice(get_args(Strategy))),
    metavar="A,B",
    help="One run for each, of equal local epochs. Default: the configuration's.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Training processes at a time. Default: as many as cores; 1 on a GPU.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where training computes. Default: the configuration's.")
@click.option("--faults", type=click.IntRange(min=1), metavar="N", help="Instead: N random schedules of faults, without training or data.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the first schedule of --faults; alone it is shown as it goes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with --faults.")
@setting_option
@click.pass_context
def simulate(
    context: click.Context,
    config: str | None,
    data: str | None,
    out: Path,
    dropout: float,
    seeds: tuple[int, ...] | None,
    strategies: tuple[str, ...] | None,
    workers: int | None,
    device: str | None,
    faults: int | None,
    seed: int,
    as_json: bool,
    settings: tuple[str, ...],
) -> None:
    """Run a whole fleet of data.devices in this process, with the server, agents and training that real devices have.

    Leaves report.json, report.md and curves.png in --out. Ctrl-C ends it, and the same command goes on from there.
    With --faults devices, server and broker of tiny fleets are killed and cut off at random instead, in virtual time.
    """
    context.with_resource(on_endings(leave))  # before the imports, which take their time
    if faults is not None:
        if config is not None or data is not None or settings:
            raise click.UsageError("--faults draws fleets of its own: leave out the configuration, --data and --set")
        from lwfed.tools.faults.command import run_faults

        context.exit(0 if run_faults(faults, seed, as_json) else 1)
    if config is None or data is None:
        raise click.UsageError("name a configuration and --data, or ask for --faults")

    from lwfed.tools.simulation.command import Simulation
    from lwfed.tools.simulation.command import simulate as run

    run(Simulation(config, settings, out, data, dropout, seeds, strategies, workers, device))


@main.command()
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder for runs and table; the same again goes on.",
)
@click.option(
    "--seeds", callback=listed(click.IntRange(min=0)), metavar="0,1,2", help="Default: the table's. All rows get the first one first."
)
@click.option("--into", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Page that has a place for the table.")
@click.option("--workers", type=click.IntRange(min=1), help="As of `lwfed simulate`.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="As of `lwfed simulate`.")
@click.pass_context
def table(
    context: click.Context, name: str, out: Path, seeds: tuple[int, ...] | None, into: Path | None, workers: int | None, device: str | None
) -> None:
    """Simulate every row of a table, and compare them.

    Leaves table.md and table.png in --out, renewed after each row. Ctrl-C ends it, and the same command goes on from there.
    """
    context.with_resource(on_endings(leave))  # before the imports, which take their time

    from lwfed.tools.tables import make_table

    make_table(name, out, seeds, into, workers, device)


@main.group(invoke_without_command=True)
@click.option("--quick", is_flag=True, help="Batch 128 and the last stage only: about 3 minutes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: ratios, and the rows that they are of.")
@click.pass_context
def bench(context: click.Context, quick: bool, as_json: bool) -> None:
    """Measure training layer by layer beside end-to-end training as published code does it: memory, time, FLOPs, bytes.

    ViT-Tiny and batches of 512 as in the paper, every row in fresh processes of this machine, one thread each. `server`
    and `links` measure the cloud-server and bad networks instead.
    """
    if context.invoked_subcommand is not None:
        if quick or as_json:
            raise click.UsageError(f"write options behind `{context.invoked_subcommand}`")
        return
    context.with_resource(on_endings(leave))  # before the imports, which take their time

    from lwfed.tools.bench.command import run_bench

    context.exit(0 if run_bench(quick, as_json) else 1)


@bench.command()
@click.option(
    "--devices",
    callback=listed(click.IntRange(1, 2000)),
    default="10,100",
    show_default=True,
    metavar="A,B",
    help="One run for each number.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Of each run.")
@click.option(
    "--broker", type=click.Choice(["mosquitto", "embedded"]), default="mosquitto", show_default=True, help="Started by the server."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with every round.")
@setting_option
@click.pass_context
def server(context: click.Context, devices: tuple[int, ...], rounds: int, broker: str, as_json: bool, settings: tuple[str, ...]) -> None:
    """Measure a server with many devices on this machine: updates per second, memory, CPU time, and that nothing is lost.

    Devices have the real protocol and a connection each, and answer at once, with updates of ViT-Tiny's first stage.
    """
    context.with_resource(on_endings(leave))  # before the imports, which take their time
    from typing import Any, cast

    from lwfed.tools.load.command import run_load

    context.exit(0 if run_load(devices, rounds, cast(Any, broker), settings, as_json) else 1)


@bench.command()
@click.option("--codec", type=click.Choice(["int8", "bf16", "fp32"]), default="int8", show_default=True, help="transfer.codec of the runs.")
@click.option(
    "--broker", type=click.Choice(["auto", "mosquitto", "embedded"]), default="auto", show_default=True, help="As of `cloud-server serve`."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def links(context: click.Context, codec: str, broker: str, as_json: bool) -> None:
    """Run a server and two devices over slow, late, stalling and breaking links: seconds and bytes of a round.

    About six minutes. The exit code is 1 if an update was lost, or if links gave different encoders.
    """
    context.with_resource(on_endings(leave))  # before the imports, which take their time

    from lwfed.tools.links.table import run_links

    context.exit(0 if run_links(codec, broker, as_json) else 1)


@main.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Download a data set known by name (cifar10, mnist, ...) for --data, or for evaluation and calibration."""
    from lwfed.data import downloads
    from lwfed.errors import DataError

    if name not in downloads.NAMES:
        raise DataError(f"{name!r} is none of the data sets that can be downloaded: {', '.join(downloads.NAMES)}")
    from lwfed.data import torchvision_sets

    click.echo(f"{name}: {torchvision_sets.fetch(name)}")


@main.command()
@click.argument("name", required=False, metavar="[NAME|FILE]")
@setting_option
def config(name: str | None, settings: tuple[str, ...]) -> None:
    """Check a configuration and print all its keys; without NAME, list the presets."""
    import yaml

    from lwfed.config import load_config, presets

    if name is None:
        click.echo("\n".join(presets()))
    else:
        click.echo(yaml.safe_dump(load_config(name, settings).model_dump(mode="json"), sort_keys=False), nl=False)


@main.command()
@click.argument("encoder", metavar="FILE|STATE", type=click.Path(path_type=Path))
@database_option
@click.option("--data", required=True, metavar="NAME|FILE|FOLDER", help="Labelled images: a data set, an .npz file, a folder of classes.")
@click.option(
    "--protocol",
    "protocols",
    default="knn,probe",
    show_default=True,
    callback=listed(click.Choice(["knn", "probe", "finetune"])),
    metavar="A,B",
    help="What to measure; finetune trains the whole encoder on the labels, as the paper does, and from random weights too.",
)
@click.option("--neighbours", type=click.IntRange(min=1), default=5, show_default=True, help="k of kNN.")
@click.option("--epochs", type=click.IntRange(min=1), default=40, show_default=True, help="Of fine-tuning.")
@click.option("--limit", type=click.IntRange(min=2), default=10_000, show_default=True, help="At most so many images of each split.")
@click.option("--seed", type=click.IntRange(min=0), help="Of halves, random weights and fine-tuning. Default: the run's.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of torch.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the report, as JSON.")
@json_option
def evaluate(
    encoder: Path,
    database: str | None,
    data: str,
    protocols: tuple[str, ...],
    neighbours: int,
    epochs: int,
    limit: int,
    seed: int | None,
    threads: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure an encoder (of `cloud-server export`, or of the run in a server's STATE) on labelled images."""
    from typing import Any, cast

    from lwfed.tools.evaluate.command import Asked, run_evaluate

    run_evaluate(Asked(encoder, database, data, cast(Any, protocols), neighbours, epochs, limit, seed, threads), as_json, out)


@main.command()
@click.argument("name", metavar="NAME|FILE")
@setting_option
@json_option
def cost(name: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Reckon what a configuration costs a device under each strategy: computation, bytes, memory; nothing is trained."""
    from lwfed.config import load_config
    from lwfed.tools.cost.report import run_cost

    run_cost(load_config(name, settings), as_json)


@main.command()
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--data", metavar="NAME|FILE|FOLDER", help="What devices are given; a folder is shared. Default: the set that the configuration names."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also draw it, as PNG.")
@setting_option
@json_option
def split(name: str, data: str | None, out: Path | None, settings: tuple[str, ...], as_json: bool) -> None:
    """Show how a configuration splits images among devices and server; nothing is trained."""
    from lwfed.config import load_config
    from lwfed.tools.split import run_split

    run_split(load_config(name, settings), data, out, as_json)


if __name__ == "__main__":
    main()
