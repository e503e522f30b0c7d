"""``lwfed bench links``."""

from __future__ import annotations

import click

from lwfed.tools.endings import leave, on_endings


@click.command()
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
