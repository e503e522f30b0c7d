"""``lwfed split``: who gets which images, known before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import numpy.typing as npt

from lwfed.config import RunConfig
from lwfed.data.division import divide
from lwfed.data.partitions import Rows
from lwfed.data.source import Source, open_source
from lwfed.errors import ConfigError, MissingDependency, StateError

Remark = Literal["unfit", "few", ""]
Counts = npt.NDArray[np.int64]
MAX_COLUMNS = 12  # classes that fit a terminal


@dataclass(frozen=True)
class Split:
    """Images of each class in each share. A set without classes has one, called images."""

    data: str
    config: RunConfig
    classes: tuple[str, ...]
    devices: Counts  # [devices, classes]
    server: Mapping[str, Counts]  # "auxiliary", "labelled" -> [classes], of what it keeps

    def remark(self, device: int) -> Remark:
        """unfit: it has too few images to be asked to train; few: it trains, on less than a batch."""
        images = self.devices[device].sum()
        return "unfit" if images < self.config.data.min_images else "few" if images < self.config.train.batch_size else ""

    @property
    def title(self) -> str:
        """The partition with the value that shapes it."""
        data = self.config.data
        shaped_by = {"dirichlet": "dirichlet_beta", "quantity": "quantity_beta", "classes": "classes_per_device"}.get(data.partition)
        return data.partition + (f", {shaped_by} {getattr(data, shaped_by):g}" if shaped_by else "")


def make_split(spec: str, config: RunConfig) -> Split:
    """How the images that `spec` names are split by `config`; a folder is shared by all devices. Raises DataError."""
    source = open_source(spec)
    division = divide(source, config)
    classes = division.classes if division.labels is not None else ("images",)

    def count(rows: Rows) -> Counts:
        kinds = np.zeros(len(rows), np.int64) if division.labels is None else division.labels[rows]
        return np.bincount(kinds, minlength=len(classes))

    shares = division.shares
    kept = {name: count(rows) for name, rows in (("auxiliary", shares.auxiliary), ("labelled", shares.labelled)) if len(rows)}
    name = spec if source.named else Path(spec).name or spec
    return Split(name, config, classes, np.array([count(rows) for rows in shares.devices]), kept)


def run_split(config: RunConfig, spec: str | None, out: Path | None, as_json: bool) -> None:
    """Print the split, and leave its picture in `out`."""
    split = make_split(spec or _named_by(config), config)
    if out is not None:
        _write(out, split)
    click.echo(json.dumps(_report(split)) if as_json else "\n".join(_table(split)))


def _named_by(config: RunConfig) -> str:
    for spec in (config.evaluation.data, config.calibration.data):
        if spec is not None and Source(spec).divided:
            return spec
    raise ConfigError("the configuration names no data set to split: say which one devices are given, --data NAME, FILE.npz or FOLDER")


def _write(out: Path, split: Split) -> None:
    try:
        from lwfed.tools.split_figure import draw_split
    except ImportError as error:
        raise MissingDependency(f"a picture needs {error.name}: pip install 'lwfed[demo]', or leave out --out") from None
    try:
        out.write_bytes(draw_split(split))
    except OSError as error:
        raise StateError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None


def _report(split: Split) -> dict[str, Any]:
    devices = [
        {"device": device, "images": int(counts.sum()), "counts": counts.tolist(), "remark": split.remark(device)}
        for device, counts in enumerate(split.devices)
    ]
    server = {name: {"images": int(counts.sum()), "counts": counts.tolist()} for name, counts in split.server.items()}
    config = split.config
    return {"data": split.data, "partition": split.title, "seed": config.run.seed, "classes": split.classes, "devices": devices, **server}


def _table(split: Split) -> Iterator[str]:
    yield f"{split.data}: {split.title}; seed {split.config.run.seed}\n"
    names = split.classes if 1 < len(split.classes) <= MAX_COLUMNS else ()
    widths = [max(6, len(name) + 1) for name in names]
    head = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    yield f"{'':12}{'images':>8}{'classes':>9}{head}"
    words = {
        "unfit": f"  not asked to train: fewer than data.min_images {split.config.data.min_images}",
        "few": f"  fewer than train.batch_size {split.config.train.batch_size}",
        "": "",
    }
    rows = [(f"device {device}", counts, words[split.remark(device)]) for device, counts in enumerate(split.devices)]
    for name, counts, remark in [*rows, *((name, counts, "") for name, counts in split.server.items())]:
        each = "".join(f"{count:>{width}}" for count, width in zip(counts, widths, strict=True)) if names else ""
        held = str(np.count_nonzero(counts)) if len(split.classes) > 1 else ""
        yield f"{name:12}{counts.sum():>8}{held:>9}{each}{remark}"
