"""The demo's report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

from lwfed.tools.account import total, training_mb

CALIBRATION = (
    " The server calibrates the whole model after each round here, so lower layers travel down again; "
    "with calibration at stage ends, or none, they do not."
)


def page(report: Mapping[str, Any], picture: bytes) -> str:
    """Fill page.html with the figures of `report` and the PNG bytes `picture`."""
    config, staged, whole = report["config"], total(report["stages"]), report["end_to_end"]
    template = Template(resources.files("lwfed.tools").joinpath("page.html").read_text("utf-8"))
    return template.substitute(
        picture=base64.b64encode(picture).decode(),
        devices=config["data"]["devices"],
        stages=len(report["stages"]),
        depth=config["model"]["depth"],
        partition=", uneven in its classes" if config["data"]["partition"] in ("dirichlet", "classes") else "",
        added="a single layer" if config["stages"]["layers_per_stage"] == 1 else f"{config['stages']['layers_per_stage']} layers",
        calibration=CALIBRATION if (config["calibration"]["every"], config["calibration"]["scope"]) == ("round", "model") else "",
        random=_percent(report["random"]["knn"]),
        trained=_percent(staged["knn"]),
        end_to_end=_percent(whole["knn"]),
        raw=_percent(report["raw_pixels"]["knn"]),
        memory=f"{training_mb(staged):.0f} MB against {training_mb(whole):.0f} MB",
        traffic=f"{_megabytes(staged)} MB against {_megabytes(whole)} MB",
        rows="\n".join(_rows(report)),
        neighbours=config["evaluation"]["neighbours"],
        seed=report["seed"],
        command=escape(report["command"]),
        seconds=f"{report['seconds']:.0f}",
        machine=escape("{processor}, {cores} cores, {memory_mb} MB, {system}, Python {python}".format(**report["machine"])),
        versions=escape(", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        digest=report["encoder_sha256"],
    )


def _rows(report: Mapping[str, Any]) -> list[str]:
    rows = [_row("random weights, the ones training began with", report["random"]), _row("raw pixels", report["raw_pixels"])]
    rows += [_row(f"after stage {record['stage']}", record) for record in report["stages"]]
    rows.append(_row("all stages", total(report["stages"]), "sum"))
    rows.append(_row("end to end, for comparison", report["end_to_end"], "sum"))
    return rows


def _row(name: str, record: Mapping[str, Any], kind: str = "") -> str:
    cells = [_percent(record["knn"]), _percent(record["probe"])]
    if "seconds" in record:
        memory = (record["worker_peak_mb"], record["worker_baseline_mb"], training_mb(record))
        traffic = (f"{record[key] / 1e6:.1f}" for key in ("bytes_down", "bytes_up"))
        cells += [*(f"{value:.0f}" for value in memory), *traffic, f"{record['seconds']:.0f}"]
    cells += [""] * (8 - len(cells))
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}&nbsp;%"


def _megabytes(record: Mapping[str, Any]) -> str:
    return f"{(record['bytes_down'] + record['bytes_up']) / 1e6:.1f}"
