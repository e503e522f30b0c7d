"""What the server's worker does with torch: first weights, calibration, evaluation (`cloud_server/worker.py` has its jobs)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwfed.child import Json
from lwfed.cloud_server.halves import halves
from lwfed.config import RunConfig
from lwfed.data.images import Images
from lwfed.data.load import auxiliary_images, labelled_images
from lwfed.errors import MissingDependency
from lwfed.models.backbones import load_encoder
from lwfed.models.evaluation.classifiers import knn, linear_probe
from lwfed.models.evaluation.collapse import FEWEST, collapsed, variety
from lwfed.models.evaluation.features import features, raw_pixels
from lwfed.models.evaluation.metrics import metrics
from lwfed.models.graphs import make_graphs
from lwfed.models.initial import grow, init_parts
from lwfed.models.local import calibration_task, train_local
from lwfed.models.placement import choose, move, move_images
from lwfed.models.shapes import Shape, part_shapes
from lwfed.plan import by_part, in_model_order
from lwfed.seeds import derive
from lwfed.wire import tensors as wire

Loader = Callable[[RunConfig, Path], Images]


class TorchJobs:
    """Keeps the images between jobs: decoding them takes longer than a small round."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, str], Images] = {}

    def do(self, config: RunConfig, data: Json) -> Json:
        torch.set_num_threads(config.train.threads)
        device = choose(config.worker.device)
        jobs = {"prepare": self._prepare, "calibrate": self._calibrate, "evaluate": self._evaluate}
        return jobs[data["do"]](config, data, device)

    def _prepare(self, config: RunConfig, data: Json, device: torch.device) -> Json:
        added = grow(_with_stream(config, data["attempt"]), config.plan(data["stage"]), _load(config, data["parts"]))
        parts = {"parts": _write(added, Path(data["out"])), "shapes": foreseen(config)}
        try:
            graphs = make_graphs(config.model, data["graphs"], Path(data["out"]))
        except MissingDependency as error:
            return {"event": "prepared", **parts, "graphs": {}, "no_graphs": str(error)}
        return {"event": "prepared", **parts, "graphs": {engine: str(file) for engine, file in graphs.items()}, "no_graphs": None}

    def _calibrate(self, config: RunConfig, data: Json, device: torch.device) -> Json:
        started = time.monotonic()
        stage, round = data["stage"], data["round"]
        seed, place = derive(config.run.seed, "calibrate", stage, round), config.place(stage, round, data["lr_scale"])
        task = calibration_task(config, config.plan(stage), seed, place)
        images = self._load_images("auxiliary", auxiliary_images, config, data)
        trained, summary = train_local(config, task, move(_load(config, data["parts"]), device), move_images(images.pixels, device))
        files = _write(trained, Path(data["out"]))
        return {"event": "calibrated", "parts": files, "loss": summary.losses[-1], "seconds": time.monotonic() - started}

    def _evaluate(self, config: RunConfig, data: Json, device: torch.device) -> Json:
        """On the labelled images; without any, only variety is judged, by the auxiliary ones."""
        labelled = config.evaluation.data is not None
        role, load = ("labelled", labelled_images) if labelled else ("auxiliary", auxiliary_images)
        images = self._load_images(role, load, config, data)
        found = {name: _represent(config, name, data["parts"], images, device) for name in data["names"]}
        scores = {name: _scores(config, one, images) for name, one in found.items()} if labelled else {}
        judged = _judge(found["trained"]) if "trained" in found and len(images) >= FEWEST else None
        return {"event": "evaluated", "scores": scores, "variety": judged}

    def _load_images(self, role: str, load: Loader, config: RunConfig, data: Json) -> Images:
        key = role, config.digest
        if key not in self._images:
            self._images[key] = load(config, Path(data["kept"]))
        return self._images[key]


def _represent(config: RunConfig, name: str, parts: Mapping[str, str], images: Images, device: torch.device) -> Tensor:
    """Features [N, D] of all images: of the trained encoder, of the whole encoder at its beginning, or the pixels themselves."""
    if name == "raw_pixels":
        return raw_pixels(images.pixels)
    whole = config.plan(config.stage_count).present
    tensors = init_parts(config, whole) if name == "random" else _load(config, parts)
    return features(load_encoder(config.model, move(tensors, device)), images.pixels)


def _scores(config: RunConfig, found: Tensor, images: Images) -> dict[str, dict[str, float] | None]:
    assert images.labels is not None
    labels = torch.from_numpy(np.array(images.labels))
    bank, queries = (torch.from_numpy(rows) for rows in halves(images.labels, config.run.seed))
    halved = found[bank], labels[bank], found[queries]
    near = asdict(metrics(knn(*halved, config.evaluation.neighbours), labels[queries]))
    return {"knn": near, "probe": asdict(metrics(linear_probe(*halved), labels[queries])) if config.evaluation.probe else None}


def _judge(found: Tensor) -> dict[str, float | bool]:
    judged = variety(found)
    return {**asdict(judged), "collapsed": collapsed(judged)}


def _with_stream(config: RunConfig, attempt: int) -> RunConfig:
    """The configuration whose seed gives the weights of this attempt at a stage; that of the first is the run's own."""
    if attempt == 1:
        return config
    run = config.run.model_copy(update={"seed": derive(config.run.seed, "attempt", attempt)})
    return config.model_copy(update={"run": run})


def foreseen(config: RunConfig) -> dict[str, dict[str, Shape]]:
    """The tensors of every part that some stage of the run has."""
    parts = {part for stage in range(1, config.stage_count + 1) for part in config.plan(stage).present}
    return {part: part_shapes(config, part) for part in in_model_order(parts)}


def _load(config: RunConfig, parts: Mapping[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part, file in parts.items():
        arrays: Iterable[tuple[str, Any]] = wire.decode(Path(file), part_shapes(config, part)).items()
        found |= {name: torch.from_numpy(array) for name, array in arrays}
    return found


def _write(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, str]:
    """One file a part; the server makes them durable when it takes them over."""
    files = {}
    for part, held in by_part(tensors).items():
        path = folder / f"{part}.safetensors"
        path.write_bytes(wire.encode({name: tensor.cpu().numpy() for name, tensor in held.items()}))
        files[part] = str(path)
    return files
