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

TITLES = {"layer_wise": "layer by layer", "progressive": "progressively", "end_to_end": "end to end"}
HEADER = f"{'':18}{'kNN':>7}{'probe':>8}{'peak MB':>10}{'training MB':>13}{'MB down':>9}{'MB up':>8}{'s':>6}"
LEGEND = "MB down and up: per device. Training MB: peak of the training process less what it takes before data and model."
WORTH_A_LINE = {
    ("evaluation", None),
    ("round", "closed"),
    ("stage", "ended"),
    ("collapse", None),
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
    def run(self, config: RunConfig, done: int = 0) -> Iterator[None]:
        """Around one run, of which `done` updates were made before: its length is known, in epochs of devices."""
        self._title, self._place = TITLES[config.stages.strategy], "going on" if done else "starting"
        rounds = sum(config.round_counts)
        devices, sample = config.data.devices, config.rounds.sample
        each = counted(config.train.epochs, "epoch")
        some = "" if sample is None else f", {sample} at a time"
        click.echo(f"training {self._title}: {counted(devices, 'device')}{some}, {counted(rounds, 'round')} of {each}")
        if not self._live:
            yield
            return
        length = rounds * config.train.epochs * (sample or devices)
        with click.progressbar(length=length, item_show_func=lambda _: self._place, width=30) as self._bar:
            self._bar.update(done * config.train.epochs, self._place)
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
        click.echo(f"\n{HEADER}")
        for name, record in rows(report):
            click.echo(row(name, record))
        click.echo(row("end to end", report["end_to_end"]))
        click.echo(f"\n{LEGEND}")
        click.echo(f"page: {out / 'report.html'}   picture: {out / 'report.png'}   ({report['seconds']:.0f} s in all)")


def rows(run: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of one run's table: base lines, where there are any, stages and all stages together."""
    for name in ("random", "raw_pixels"):
        if run[name] is not None:
            yield name.replace("_", " "), run[name]
    for record in run["stages"]:
        yield f"stage {record['stage']} collapsed" if record.get("collapsed") else f"after stage {record['stage']}", record
    yield "all stages", total(run["stages"])


def row(name: str, record: Mapping[str, Any]) -> str:
    text = f"{name:18}{percent(record['knn']):>7}{percent(record['probe']):>8}"
    if "seconds" not in record:
        return text
    memory = f"{record['worker_peak_mb']:>10.0f}{training_mb(record):>13.0f}"
    return f"{text}{memory}{record['bytes_down'] / 1e6:>9.1f}{record['bytes_up'] / 1e6:>8.1f}{record['seconds']:>6.0f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
