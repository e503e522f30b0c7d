"""``lwfed evaluate``: an encoder out of a run, on any labelled images, beside random weights and raw pixels."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lwfed.cloud_server.halves import halves
from lwfed.cloud_server.overview import export_from
from lwfed.config import ModelSection, RunConfig, load_config
from lwfed.data.images import Images, Shape
from lwfed.data.load import labelled_splits
from lwfed.errors import DataError, StateError
from lwfed.models.backbones import load_encoder
from lwfed.models.evaluation.classifiers import knn, linear_probe
from lwfed.models.evaluation.collapse import FEWEST, collapsed, variety
from lwfed.models.evaluation.features import features, raw_pixels
from lwfed.models.evaluation.finetune import Labelled, finetune
from lwfed.models.evaluation.metrics import metrics
from lwfed.models.initial import init_parts
from lwfed.plan import by_part
from lwfed.seeds import derive

Protocol = Literal["knn", "probe", "finetune"]
NAMES = {"random": "random weights", "raw_pixels": "raw pixels", "encoder": "encoder"}
TITLES = {"knn": "kNN", "probe": "linear probe", "finetune": "fine-tuned"}
COLUMNS = {"accuracy": "accuracy", "class_accuracy": "per class", "precision": "precision", "recall": "recall", "f1": "F1"}

Record = dict[str, Any]
Predict = Callable[[], Tensor]


@dataclass(frozen=True)
class Asked:
    """What `lwfed evaluate` was told."""

    encoder: Path  # a file, or the --state of a server
    database: str | None  # of that server; None: a file in its folder
    data: str
    protocols: tuple[Protocol, ...]
    neighbours: int
    epochs: int  # of fine-tuning
    limit: int  # images of each split
    seed: int | None  # None: that of the run
    threads: int


@dataclass(frozen=True)
class Subject:
    """An encoder, and what else its file says."""

    model: ModelSection
    tensors: Mapping[str, Tensor]
    about: Record


def run_evaluate(asked: Asked, as_json: bool, out: Path | None) -> None:
    report = make_report(asked)
    if out is not None:
        try:
            out.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise StateError(f"cannot write {out}: {error.strerror or error}") from None
    click.echo(json.dumps(report) if as_json else "\n".join(_table(report)))


def make_report(asked: Asked) -> Record:
    """Raises DataError, MissingDependency and StateError."""
    torch.set_num_threads(asked.threads)
    subject = read_encoder(asked.encoder, asked.database)
    seed = subject.about["seed"] if asked.seed is None else asked.seed
    bank, queries = _images(asked, seed, Shape(subject.model.image_size, subject.model.channels))
    named: dict[str, Mapping[str, Tensor] | None] = {
        "random": init_parts(_config(subject.model, seed), by_part(subject.tensors)),
        "raw_pixels": None,
        "encoder": subject.tensors,
    }
    rows, judged = [], {}
    for name, tensors in named.items():
        seen, asked_about = (_represent(subject.model, tensors, images) for images in (bank, queries))
        if tensors is not None:
            found = variety(asked_about)
            judged[name] = {**asdict(found), "collapsed": collapsed(found) if len(queries) >= FEWEST else None}
        for protocol, predict in _predictions(asked, seed, subject.model, tensors, bank, queries, seen, asked_about).items():
            rows.append({"name": name, "protocol": protocol, **_measure(f"{NAMES[name]}: {TITLES[protocol]}", predict, queries)})
    return {
        "encoder": {name: subject.about.get(name) for name in ("run", "strategy", "stage", "config_sha256", "version")},
        "data": asked.data,
        "classes": len(bank.classes),
        "bank": len(bank),
        "limit": asked.limit,
        "queries": len(queries),
        "neighbours": asked.neighbours,
        "epochs": asked.epochs,
        "seed": seed,
        "features": judged,
        "rows": rows,
    }


def _predictions(
    asked: Asked,
    seed: int,
    model: ModelSection,
    tensors: Mapping[str, Tensor] | None,
    bank: Images,
    queries: Images,
    seen: Tensor,
    asked_about: Tensor,
) -> dict[Protocol, Predict]:
    """By protocol: what predicts the labels of the queries. Pixels cannot be fine-tuned: a linear probe stands for them."""
    labels = _labels(bank)

    def tell(epoch: int, loss: float) -> None:
        click.echo(f"  epoch {epoch} of {asked.epochs}: loss {loss:.3f}", err=True)

    found: dict[Protocol, Predict] = {
        "knn": lambda: knn(seen, labels, asked_about, asked.neighbours),
        "probe": lambda: linear_probe(seen, labels, asked_about),
    }
    if tensors is not None:
        given = Labelled(bank.pixels, labels)
        found["finetune"] = lambda: finetune(model, tensors, given, queries.pixels, seed, asked.epochs, tell)
    return {protocol: found[protocol] for protocol in asked.protocols if protocol in found} or {"probe": found["probe"]}


def _measure(what: str, predict: Predict, queries: Images) -> Record:
    click.echo(what, err=True)
    began = time.monotonic()
    found = metrics(predict(), _labels(queries))
    return {**asdict(found), "seconds": round(time.monotonic() - began, 2)}


def _represent(model: ModelSection, tensors: Mapping[str, Tensor] | None, images: Images) -> Tensor:
    """Features [N, D], or the pixels themselves."""
    return raw_pixels(images.pixels) if tensors is None else features(load_encoder(model, tensors), images.pixels)


def _labels(images: Images) -> Tensor:
    assert images.labels is not None
    return torch.from_numpy(np.array(images.labels))


def _config(model: ModelSection, seed: int) -> RunConfig:
    """Some configuration with this model, for its initial weights."""
    base = load_config("base")
    stages = base.stages.model_copy(update={"strategy": "end_to_end", "layers_per_stage": 1})
    return base.model_copy(update={"model": model, "stages": stages, "run": base.run.model_copy(update={"seed": seed})})


def read_encoder(path: Path, database: str | None) -> Subject:
    """The encoder in `path`, a file that `cloud-server export` wrote or the folder of a run, which `database` has the records of.

    Raises StateError.
    """
    if path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            export_from(path, Path(folder) / "encoder.safetensors", None, database)
            return read_encoder(Path(folder) / "encoder.safetensors", None)
    remedy = "give a file that `cloud-server export` has written, or the --state of a server"
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("lwfed", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        model = ModelSection.model_validate_json(json.dumps(about["model"]))
        load_encoder(model, tensors)
        int(about["seed"])
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path} cannot be read ({error}): {remedy}") from None
    except (KeyError, TypeError, ValueError, ValidationError, RuntimeError):
        raise StateError(f"{path} is no encoder of lwfed, or of another version of it: {remedy}") from None
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise StateError(f"{path} holds weights that are not finite: export an earlier stage")
    return Subject(model, tensors, about)


def _images(asked: Asked, seed: int, shape: Shape) -> tuple[Images, Images]:
    """Bank and queries: training and test split, or halves of each class. Raises DataError."""
    found, test = labelled_splits(asked.data, shape)
    if found.labels is None or len(found.classes) < 2:
        raise DataError(f"{asked.data!r} gives no labelled images of two classes or more: put each class into its own sub-folder")
    if test is None:
        bank, queries = halves(found.labels, seed)
        found, test = _chosen(found, bank), _chosen(found, queries)
    if test.labels is None or not len(test):
        raise DataError(f"{asked.data!r} has no labelled images to test with: two of each class are needed at least")
    return _fewer(found, asked.limit, derive(seed, "evaluate", "bank")), _fewer(test, asked.limit, derive(seed, "evaluate", "queries"))


def _fewer(images: Images, limit: int, seed: int) -> Images:
    if len(images) <= limit:
        return images
    return _chosen(images, np.sort(np.random.default_rng(seed).permutation(len(images))[:limit]))


def _chosen(images: Images, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Images:
    assert images.labels is not None
    return Images(images.pixels[rows], images.labels[rows], images.classes)


def _table(report: Record) -> Iterator[str]:
    about = report["encoder"]
    yield f"run {about['run']}, {about['strategy']}, stage {about['stage']}, on {report['data']}: {report['classes']} classes"
    limited = f" (--limit {report['limit']})" if report["limit"] in (report["bank"], report["queries"]) else ""
    yield f"{report['bank']} images to learn labels from, {report['queries']} to test{limited}; seed {report['seed']}\n"
    yield f"{'':16}{'':14}" + "".join(f"{title:>11}" for title in COLUMNS.values()) + f"{'s':>8}"
    for row in report["rows"]:
        figures = "".join(f"{row[column]:>11.1%}" for column in COLUMNS)
        yield f"{NAMES[row['name']]:16}{TITLES[row['protocol']]:14}{figures}{row['seconds']:>8.1f}"
    yield ""
    for name, found in report["features"].items():
        warning = "; collapsed: they do not tell images apart" if found["collapsed"] else ""
        yield f"features of {NAMES[name]}: spread {found['spread']:.3f}, effective rank {found['rank']:.1f}{warning}"
