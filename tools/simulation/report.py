"""What `lwfed simulate` leaves: report.json, curves.png, and tables in report.md and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from lwfed.console import counted
from lwfed.errors import StateError
from lwfed.tools.account import training_mb
from lwfed.tools.screen import HEADER, LEGEND, TITLES, percent, row, rows
from lwfed.tools.simulation.records import means

Report = Mapping[str, Any]


def write(out: Path, report: Report, draw: Callable[[Report], bytes]) -> None:
    try:
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        (out / "curves.png").write_bytes(draw(report))
        (out / "report.md").write_text(markdown(report), encoding="utf-8")
    except OSError as error:
        raise StateError(f"cannot write {error.filename}: {error.strerror or error}; check free space and permissions") from None


def show(report: Report, out: Path) -> None:
    """Tables of means on the terminal, and where the rest is."""
    for strategy, summary in report["summary"].items():
        click.echo(f"\n{heading(report, strategy)}\n{HEADER}")
        for name, record in rows(means(summary)):
            click.echo(row(name, record))
        if len(report["seeds"]) > 1:
            spread = means(summary, "spread")["total"]
            click.echo(row("spread of the last", {"knn": spread.get("knn"), "probe": spread.get("probe")}))
    click.echo(f"\n{LEGEND}")
    click.echo(f"report: {out / 'report.md'}   picture: {out / 'curves.png'}   ({report['seconds']:.0f} s in all)")


def markdown(report: Report) -> str:
    lines = ["# Simulation", "", f"`{report['command']}`", ""]
    devices, sample = report["config"]["data"]["devices"], report["config"]["rounds"]["sample"]
    some = "all of them in each round" if sample is None else f"{sample} of them in each round"
    lines += [f"{counted(devices, 'device')} with {report['data']}, {some}; drop-out probability {report['dropout']:g}.", ""]
    for strategy, summary in report["summary"].items():
        lines += [f"## {heading(report, strategy).capitalize()}", "", *_table(summary, len(report["seeds"]) > 1), ""]
    lines += [LEGEND, "", "![curves](curves.png)", "", "| run | encoder's SHA-256 |", "|---|---|"]
    lines += [f"| {run['strategy']}, seed {run['seed']} | `{run['encoder_sha256']}` |" for run in report["runs"]]
    machine = "{processor}, {cores} cores, {memory_mb} MB, {system}, Python {python}".format(**report["machine"])
    lines += ["", f"{machine}; {', '.join(f'{name} {number}' for name, number in report['versions'].items())}."]
    return "\n".join(lines) + "\n"


def heading(report: Report, strategy: str) -> str:
    seeds = report["seeds"]
    return f"{TITLES[strategy]}, " + (f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}")


def _table(summary: Mapping[str, Any], several: bool) -> Iterator[str]:
    yield "| | kNN | probe | peak MB | training MB | MB down | MB up | s |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for (name, record), (_, spread) in zip(rows(means(summary)), rows(means(summary, "spread")), strict=True):
        cells = [_share(record, spread if several else {}, figure) for figure in ("knn", "probe")]
        if "seconds" in record:
            cells += [f"{record['worker_peak_mb']:.0f}", f"{training_mb(record):.0f}"]
            cells += [f"{record[figure] / 1e6:.1f}" for figure in ("bytes_down", "bytes_up")] + [f"{record['seconds']:.0f}"]
        yield f"| {name} | " + " | ".join(cells + [""] * (7 - len(cells))) + " |"


def _share(record: Mapping[str, Any], spread: Mapping[str, Any], figure: str) -> str:
    share = percent(record.get(figure))
    return share if spread.get(figure) is None else f"{share} ± {100 * spread[figure]:.1f}"
