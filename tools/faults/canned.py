"""Training without torch: small tensors under the names of a real model, and what becomes of them a function of what went in.

As with real training the result depends on every input: a device that trained on a stale model, for another round or as
somebody else gives other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from lwfed import disk
from lwfed.child import Ended, Json, Said
from lwfed.cloud_server.merge import merge
from lwfed.cloud_server.workshop import FromChild
from lwfed.config import RunConfig
from lwfed.edge_agent import differences
from lwfed.edge_agent.events import WorkerDone, WorkerPatched, WorkerPlanned, WorkerProgress, WorkerReady
from lwfed.edge_agent.previous import Turn
from lwfed.seeds import derive
from lwfed.wire import tensors as wire
from lwfed.wire.report import Memory

WIDTH, HIDDEN = 8, 32
HALF = np.float32(0.5)  # of what was there stays: weights neither grow nor come to rest
KNOWN = 64  # parts and configurations that were read last
Tensors = dict[str, wire.Array]
Model = dict[str, Tensors]  # part -> its tensors
Forms = tuple[tuple[int, ...], ...]  # shapes, one after another

READY = WorkerReady(torch="canned", machine="canned")
PLANNED = WorkerPlanned(prefix="torch", micro_batch=16, reason="canned", needs_mb=100.0)
PROGRESS = WorkerProgress(epoch=1, epochs=1, step=1, steps=2, loss=1.0, rss_mb=100.0)


@cache
def shapes(part: str) -> dict[str, tuple[int, ...]]:
    """In the order of names, as files have them: noise is drawn in that order."""
    kind, _, number = part.partition(".")
    match kind:
        case "stem":
            return {"patch_embed.proj.bias": (WIDTH,), "patch_embed.proj.weight": (WIDTH, 16)}
        case "layer":
            block = f"blocks.{int(number) - 1}.mlp"
            return {f"{block}.fc1.weight": (HIDDEN, WIDTH), f"{block}.fc2.weight": (WIDTH, HIDDEN)}
        case "norm":
            return {"fc_norm.weight": (WIDTH,)}
        case _:
            return {f"{kind}.0.weight": (WIDTH, WIDTH)}


def initial(part: str, attempt: int, seed: int) -> Tensors:
    """`seed`: of the run."""
    found, shift = shapes(part), np.float32(seed / 2**31)
    noise = _noise(tuple(found.values()), "initial", part, attempt)
    return {name: values + shift for name, values in zip(found, noise, strict=True)}


def trained(model: Model, uploaded: Iterable[str], stage: int, round: int, participant: int) -> Tensors:
    """The tensors of the parts `uploaded`, after a local call; they depend on all parts of `model`."""
    received = {name: tensor for part in uploaded for name, tensor in model[part].items()}
    noise = _noise(_forms(received), "trained", stage, round, participant)
    seen = np.float32(np.sin(sum(float(tensor.sum()) for part in sorted(model) for tensor in model[part].values())))
    return {name: HALF * value + change + seen for (name, value), change in zip(received.items(), noise, strict=True)}


def calibrated(model: Model, parts: Iterable[str], stage: int, round: int) -> Model:
    before = {part: model[part] for part in parts}
    noise = iter(_noise(tuple(form for held in before.values() for form in _forms(held)), "calibrated", stage, round))
    return {part: {name: HALF * value + next(noise) for name, value in held.items()} for part, held in before.items()}


def graph(engine: str) -> bytes:
    return b"graph of " + engine.encode()


def images(participant: int) -> int:
    """|D_n|: every device weighs differently."""
    return 10 + 7 * participant


def loss(stage: int, round: int, participant: int) -> float:
    return 1.0 / (1 + stage + round + participant)


def load(files: Mapping[str, str]) -> Model:
    return {part: _decoded(part, Path(file).read_bytes()) for part, file in files.items()}


def config_of(order: Mapping[str, Any]) -> RunConfig:
    return _config(Path(order["config"]).read_bytes())


def receive(order: Mapping[str, Any], config: RunConfig) -> tuple[Model, WorkerPatched | None]:
    """What the worker of a device does first: the model, and the parts that were made of patches. Raises InvalidPayload."""
    graphs = {engine: Path(file).read_bytes() for engine, file in order["graphs"].items()}
    sent = {engine: graph(engine) for engine in config.graphs if config.plan(order["stage"]).frozen_layers}
    if graphs not in ({}, sent):  # none once a process has died that had some
        raise RuntimeError(f"a device trains stage {order['stage']} with the graphs {graphs}")
    told, made = order["parts"], {}
    for part, way in told.items():
        if isinstance(way, dict):
            made[part] = Path(order["out"]).with_name(f"{part}.patched")
            patches = [Path(file) for file in way["patches"]]
            made[part].write_bytes(differences.patch(config, part, shapes(part), Path(way["base"]), patches, way["id"]))
    model = load({part: str(made.get(part, way)) for part, way in told.items()})
    return model, WorkerPatched(tuple(made.values())) if made else None


def planned(order: Mapping[str, Any]) -> WorkerPlanned:
    """As prescribed, or as it likes."""
    fixed = order["execution"] or {}
    return replace(PLANNED, **{key: value for key, value in fixed.items() if key in ("prefix", "micro_batch")})


def train(order: Mapping[str, Any], config: RunConfig, model: Model) -> WorkerDone:
    """What it does then."""
    stage, round, participant = order["stage"], order["round"], order["participant"]
    update = trained(model, config.plan(stage).uploaded, stage, round, participant)
    received = {name: tensor for part in config.plan(stage).uploaded for name, tensor in model[part].items()}
    file, turn = Path(order["out"]), Turn(stage, round, participant, order["after"])
    disk.write(file, differences.encode(config, turn, update, received, Path(order["kept"]), _refuse))
    memory = Memory(baseline_mb=100.0, peak_mb=150.0, peak_source="samples", curve=())
    losses = (loss(stage, round, participant),)
    return WorkerDone(file, images(participant), skipped=0, steps=2, losses=losses, seconds=1.0, memory=memory)


def _refuse(lost: str) -> None:
    raise RuntimeError(lost)


class ServerWorker:
    """In place of the server's worker, whose aggregation it has.

    `later` does something when the job has taken its time, `fails` says how it ends badly.
    """

    def __init__(
        self,
        config: RunConfig,
        deliver: Callable[[FromChild], None],
        later: Callable[[Callable[[], None]], None],
        fails: Callable[[], str | None],
    ) -> None:
        self._config, self._deliver, self._later, self._fails = config, deliver, later, fails
        self._alive = True

    def send(self, job: Json) -> None:
        self._later(lambda: self._do(job))

    def kill(self) -> None:
        self._alive = False

    def close(self) -> None:
        pass

    def _do(self, job: Json) -> None:
        if not self._alive:
            return
        child = cast(Any, self)
        match self._fails():
            case None:
                self._deliver(Said(child, getattr(self, f"_{job['do']}")(job)))
            case "killed":
                self._deliver(Ended(child, "killed", "was ended by SIGKILL"))
            case kind:
                self._deliver(Said(child, {"event": "error", "kind": kind, "message": "as the schedule says"}))

    def _prepare(self, job: Json) -> Json:
        plan = self._config.plan(job["stage"])
        present = {part for stage in range(1, self._config.stage_count + 1) for part in self._config.plan(stage).present}
        parts = _write({part: initial(part, job["attempt"], self._config.run.seed) for part in plan.added}, job)
        graphs = {engine: Path(job["out"]) / f"{engine}.onnx" for engine in job["graphs"]}
        for engine, file in graphs.items():
            file.write_bytes(graph(engine))
        made = {engine: str(file) for engine, file in graphs.items()}
        foreseen = {part: shapes(part) for part in sorted(present)}
        return {"event": "prepared", "parts": parts, "shapes": foreseen, "graphs": made, "no_graphs": None}

    def _aggregate(self, job: Json) -> Json:
        return {"event": "aggregated", **asdict(merge(self._config, job))}

    def _calibrate(self, job: Json) -> Json:
        parts = self._config.plan(job["stage"]).calibrated
        found = calibrated(load(job["parts"]), parts, job["stage"], job["round"])
        return {"event": "calibrated", "parts": _write(found, job), "loss": 0.5, "seconds": 1.0}

    def _evaluate(self, job: Json) -> Json:
        return {"event": "evaluated", "scores": {}, "variety": None}


def _write(model: Model, job: Json) -> dict[str, str]:
    files = {part: Path(job["out"]) / f"{part}.safetensors" for part in model}
    for part, file in files.items():
        file.write_bytes(wire.encode(model[part]))
    return {part: str(file) for part, file in files.items()}


def _forms(tensors: Tensors) -> Forms:
    return tuple(tensor.shape for tensor in tensors.values())


@lru_cache(maxsize=KNOWN)
def _config(data: bytes) -> RunConfig:
    return RunConfig.from_bytes(data)


@lru_cache(maxsize=KNOWN)  # all devices read the same parts, and some in every round
def _decoded(part: str, data: bytes) -> Tensors:
    return wire.decode(data, shapes(part))


@cache  # of all schedules
def _noise(forms: Forms, purpose: str, *labels: int | str) -> tuple[wire.Array, ...]:
    stream = np.random.default_rng(derive(0, purpose, *labels))
    return tuple(stream.standard_normal(form, dtype=np.float32) for form in forms)
