"""A few optimiser steps of one stage in processes of their own, watched from outside.

`agent` measures what ships: a control process and its training process, driven as by a server. `published` measures
`lwfed.models.end_to_end` the same way. The first step of either is a warm-up and does not count.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lwfed.child import Child, Ended, Json, Said
from lwfed.config import RunConfig
from lwfed.control_groups import OomKills
from lwfed.edge_agent.events import VIEWS
from lwfed.edge_agent.profiling.limits import NO_LIMIT, Group, Limit
from lwfed.edge_agent.profiling.memory import Footprint, Watch
from lwfed.edge_agent.profiling.scratch import scratch
from lwfed.errors import StateError, WorkerFailed
from lwfed.models.onnx_layer import NO_GRAPH

WARM_UP = 1  # steps
EPOCH_IMAGES = 5000  # of a device, where nobody says: a tenth of CIFAR-10
SAMPLE_S = 0.25
CONTROL = "lwfed.edge_agent.profiling.control"
SAMPLE = "lwfed.edge_agent.profiling.sample"
PUBLISHED = "lwfed.models.end_to_end"

OnStep = Callable[[int, int], None]  # done, of how many
OnReady = Callable[[float], None]  # MB that the program holds with its imports made


@dataclass(frozen=True)
class Measured:
    """One stage of one strategy."""

    steps_s: tuple[float, ...]  # without the warm-up
    views_s: tuple[float, ...]  # of these, making views; empty where they are not timed apart
    memory: Footprint
    planned: Mapping[str, Any] = field(default_factory=dict)  # how the training process said it computes
    cpu_s: tuple[float, ...] = ()  # of these steps, seconds that the computing process was on processors
    ahead_s: float = 0.0  # a step's part of what was computed before, for all epochs that use it again

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s) + self.ahead_s

    def epoch_s(self, images: int, batch_size: int) -> float:
        """Seconds of a local epoch."""
        return self.step_s * max(1, images // batch_size)

    def record(self) -> dict[str, Any]:
        """For reports."""
        memory = asdict(self.memory) | {"training_mb": round(self.memory.training_mb, 1)}
        times = {"step_s": round(self.step_s, 4), "steps_s": [round(one, 4) for one in self.steps_s]}
        times |= {"cpu_s": round(statistics.median(self.cpu_s), 4)} if self.cpu_s else {}
        views = {"views_s": round(statistics.median(self.views_s), 4)} if self.views_s else {}
        ahead = {"ahead_s": round(self.ahead_s, 4)} if self.ahead_s else {}
        return {**times, **views, **ahead, "memory": memory, "planned": dict(self.planned)}


@dataclass(frozen=True)
class Sample:
    """What `lwfed.edge_agent.profiling.sample` has made."""

    folder: Path
    config: Path
    parts: Mapping[str, str]
    graphs: Mapping[str, str]
    no_graphs: str | None  # why there are none
    data: str
    images: int
    bytes_down: int  # of one round
    bytes_up: int
    macs: float  # of one optimiser step, multiply-accumulates


class DidNotFit(Exception):
    """The program was ended, or gave up, for want of memory; for who measures, not for the command line."""


@contextlib.contextmanager
def sampled(config: RunConfig, stage: int, steps: int) -> Iterator[Sample]:
    """Model and images for `steps` steps besides the warm-up, in a folder where agents keep theirs, gone after the block."""
    with scratch() as folder:
        settled = settle(config)
        file = folder / "config"
        file.write_bytes(settled.to_bytes())
        images = settled.train.batch_size * (WARM_UP + steps)
        yield Sample(folder, file, images=images, **_ask({"config": str(file), "stage": stage, "images": images, "folder": str(folder)}))


def settle(config: RunConfig) -> RunConfig:
    """`config` for one device that goes once through all images that there are."""
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"epochs": 1}),
            "data": config.data.model_copy(update={"devices": 1, "partition": "even", "auxiliary_share": 0.0, "min_images": 2}),
        }
    )


def agent(
    config: RunConfig,
    sample: Sample,
    stage: int,
    on_step: OnStep,
    on_ready: OnReady = lambda _: None,
    limit: Limit = NO_LIMIT,
    budget_mb: float | None = None,
    enough_s: float = math.inf,
) -> Measured:
    """The agent of this device, training `stage` on `sample`; ends as `published` does. Raises DidNotFit, NoGroup and WorkerFailed."""
    state = sample.folder / "state"
    places = {"data": sample.data, "shared": False, "kept": str(state / "images"), "out": str(state / "update.safetensors")}
    order = {
        "do": "train",
        "config": str(sample.config),
        "parts": sample.parts,
        "graphs": sample.graphs,
        "stage": stage,
        "round": 1,
        "participant": 0,
        "after": None,
        "lr_scale": 1.0,
        "execution": None,
        "budget_mb": budget_mb,
        **places,
    }
    told = {"order": order, "threads": config.train.threads, "sample_s": config.worker.sample_s, "state": str(state)}
    state.mkdir()
    with limit.group() as group:
        found = _Run(CONTROL, {}, group, state, on_step, on_ready, enough_s).measure(told, "started")
    if found.planned.get("reason") == NO_GRAPH:
        found = replace(found, planned={**found.planned, "reason": sample.no_graphs})
    rounds = 1 if config.plan(stage).prefix_moves else config.round_counts[stage - 1]
    return replace(found, ahead_s=found.ahead_s * config.train.batch_size / sample.images / (config.train.epochs * rounds))


def published(
    config: RunConfig,
    stage: int,
    steps: int,
    on_step: OnStep,
    enough_s: float,
    least_steps: int,
    micro_batch: int | None = None,
    compiled: bool = False,
    kernels: bool = False,
) -> Measured:
    """The plain baseline; after `enough_s` seconds with at least `least_steps` that count. Raises DidNotFit and WorkerFailed."""
    with scratch() as folder:
        file, state = folder / "config", folder / "state"
        state.mkdir()
        file.write_bytes(config.to_bytes())
        told = {"config": str(file), "stage": stage, "steps": WARM_UP + steps, "micro_batch": micro_batch}
        told |= {"compile": compiled, "kernels": kernels}
        environment = {
            "OMP_NUM_THREADS": str(config.train.threads),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else a pool of processes stays, whose memory would count
            "TORCHINDUCTOR_CACHE_DIR": str(state),
        }
        return _Run(PUBLISHED, environment, Group(), state, on_step, lambda _: None, enough_s, least_steps).measure(told, "ready")


class _Run:
    """One program from its start to its end."""

    def __init__(
        self,
        module: str,
        env: Mapping[str, str],
        group: Group,
        folder: Path,
        on_step: OnStep,
        on_ready: OnReady,
        enough_s: float = math.inf,
        least_steps: int = 1,
    ) -> None:
        self._said: queue.SimpleQueue[Said | Ended] = queue.SimpleQueue()
        self._oom_kills = OomKills()
        self._child = Child(module, self._said.put, env, group.command)
        self._watch = Watch(self._child.pid)
        self._group, self._folder, self._on_step, self._on_ready, self._enough_s = group, folder, on_step, on_ready, enough_s
        self._least_steps, self._started = least_steps, time.monotonic()
        self._ends: list[float] = []  # of steps, by time.monotonic
        self._cpu_s: list[float] = []  # at these, of the computing process
        self._views_s: list[float] = []
        self._planned: Json = {}
        self._ahead: list[float] = []  # when views that are used again were computed

    def measure(self, told: Json, greeting: str) -> Measured:
        """Tell it what to do when it has said `greeting`, and watch it until it is done."""
        try:
            while not self._enough() and (said := self._next())["event"] != "done":
                if said["event"] == greeting:
                    self._child.send(told)
                self._hear(said)
            memory = self._watch.finish(self._folder, self._group.peak_mb(self._child.pid))
        finally:
            self._child.kill()
            self._child.close()
        steps, cpu_s = ([after - before for before, after in pairwise(one)] for one in (self._ends, self._cpu_s))
        ahead_s = self._ahead[-1] - self._ahead[0] if self._ahead else 0.0
        return Measured(tuple(steps), tuple(self._views_s[WARM_UP:]), memory, self._planned, tuple(cpu_s), ahead_s)

    def _enough(self) -> bool:
        return len(self._ends) >= WARM_UP + self._least_steps and time.monotonic() - self._started > self._enough_s

    def _next(self) -> Json:
        """What it says next; memory is read meanwhile."""
        while True:
            self._watch.sample()
            try:
                said = self._said.get(timeout=SAMPLE_S)
            except queue.Empty:
                continue
            if isinstance(said, Ended):
                if said.kind == "killed" and self._oom_kills.happened():  # systemd ends the rest of a scope
                    raise DidNotFit(f"{said.reason} when memory had run out")
                raise _failed(said.kind, said.reason)
            return said.data

    def _hear(self, said: Json) -> None:
        match said["event"]:
            case "ready":
                self._on_ready(self._watch.ready(said.get("pid", self._child.pid), said.get("before_mb", 0.0)))
            case "planned":
                self._planned = {name: value for name, value in said.items() if name != "event"}
            case "loading" if said["what"] == VIEWS:
                self._ahead.append(time.monotonic())
            case "progress":
                self._ends.append(time.monotonic())
                self._cpu_s.append(self._watch.cpu_s())
                self._views_s += [said["views_s"]] if "views_s" in said else []
                self._on_step(said["step"], said["steps"])
            case "error":
                raise _failed(said["kind"], said["message"])


def _failed(kind: str, message: str) -> Exception:
    memory = ("OutOfMemory", "Unfit", "out of memory")
    return DidNotFit(message) if kind in memory else WorkerFailed(f"the measured process failed: {message}")


def _ask(order: Json) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", SAMPLE], input=json.dumps(order), capture_output=True, text=True)
    if done.returncode == StateError.exit_code:
        raise OSError(done.stderr.strip())
    if done.returncode != 0:
        problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise WorkerFailed(f"no model could be made to measure with ({problem}): `edge-agent doctor` checks torch")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
