"""What the demo shows while it runs: a live bar on a terminal, plain lines otherwise; at the end a table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from lwfed.config import RunConfig
from lwfed.console import counted
from lwfed.tools.account import total, training_mb

TITLES = {"layer_wise": "layer by layer", "end_to_end": "end to end"}
WORTH_A_LINE = {
    ("evaluation", None),
    ("round", "closed"),
    ("stage", "ended"),
    ("device", "joined"),
    ("warning", None),
    ("waiting", None),
    ("broker", None),
}


class Screen:
    def __init__(self, live: bool) -> None:
        self._live = live
        self._bar: Any = None
        self._title = ""
        self._place = ""

    @contextlib.contextmanager
    def run(self, config: RunConfig) -> Iterator[None]:
        """Around one run: its length is known, in epochs of devices."""
        self._title, self._place = TITLES[config.stages.strategy], "starting"
        rounds = sum(config.round_counts)
        devices = config.data.devices
        each = counted(config.train.epochs, "epoch")
        click.echo(f"training {self._title}: {counted(devices, 'device')}, {counted(rounds, 'round')} of {each}")
        if not self._live:
            yield
            return
        with click.progressbar(length=rounds * config.train.epochs * devices, item_show_func=lambda _: self._place, width=30) as self._bar:
            yield

    def show(self, program: str, said: Mapping[str, Any]) -> None:
        """An event of `program`."""
        if self._live:
            self._move(program, said)
        elif program == "server" and {(said["event"], said.get("status")), (said["event"], None)} & WORTH_A_LINE:
            click.echo(said["text"])

    def _move(self, program: str, said: Mapping[str, Any]) -> None:
        if program == "server" and said["event"] == "round" and said["status"] == "started":
            self._place = f"stage {said['stage']}, round {said['round']} of {said['rounds']}"
        elif program == "server" and said["event"] == "evaluation":
            self._place = f"{said['name'].replace('_', ' ')}: kNN {said['knn']:.1%}"
        elif said["event"] not in ("training", "doing"):
            return
        self._bar.update(int(said["event"] == "training"), self._place)

    def table(self, report: Mapping[str, Any], out: Path) -> None:
        """Results, and where the page is."""
        click.echo(f"\n{'':18}{'kNN':>7}{'probe':>8}{'peak MB':>10}{'training MB':>13}{'MB down':>9}{'MB up':>8}{'s':>6}")
        for name in ("random", "raw_pixels"):
            click.echo(_row(name.replace("_", " "), report[name]))
        for record in report["stages"]:
            click.echo(_row(f"after stage {record['stage']}", record))
        click.echo(_row("all stages", total(report["stages"])))
        click.echo(_row("end to end", report["end_to_end"]))
        click.echo("\nMB down and up: per device. Training MB: peak of the training process less what it takes before data and model.")
        click.echo(f"page: {out / 'report.html'}   picture: {out / 'report.png'}   ({report['seconds']:.0f} s in all)")


def _row(name: str, record: Mapping[str, Any]) -> str:
    row = f"{name:18}{record['knn']:>7.1%}{record['probe']:>8.1%}"
    if "seconds" not in record:
        return row
    memory = f"{record['worker_peak_mb']:>10.0f}{training_mb(record):>13.0f}"
    return f"{row}{memory}{record['bytes_down'] / 1e6:>9.1f}{record['bytes_up'] / 1e6:>8.1f}{record['seconds']:>6.0f}"
