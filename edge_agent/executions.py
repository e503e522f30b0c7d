"""How a device computes a stage is chosen once, since the bits of its updates depend on it: what the journal keeps of that."""

from __future__ import annotations

from typing import Any

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import RunConfig
from lwfed.console import counted
from lwfed.edge_agent.events import Effect, Tell, WorkerPlanned, WorkerReady
from lwfed.edge_agent.journal import Journal
from lwfed.plan import PrefixEngine
from lwfed.wire.messages import Execution, Task

LEAST_IMAGES = 4  # at a time: one saves 2 % more in stage 12 of ViT-Tiny with batches of 128, and takes twice as long


class Executions:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def fixed(self, task: Task, config: RunConfig, ready: WorkerReady) -> dict[str, Any] | None:
        """What an earlier round of the stage has fixed, where it was computed by the same program on the same machine.

        What takes the least memory holds for any, with features in a file.
        """
        before = self._journal.execution(task.run, task.stage)
        if before is None:
            return None
        least = self._journal.takes_least(task.run, task.stage)
        now = ready.torch, _machine(config, ready), _runtime(before.prefix, ready)
        if not least and (before.torch, before.machine, before.onnxruntime) != now:
            return None
        return {"prefix": before.prefix, "micro_batch": before.micro_batch} | ({"features_in": "file"} if least else {})

    def fix(self, task: Task, config: RunConfig, ready: WorkerReady, planned: WorkerPlanned) -> list[Effect]:
        """Before the first step of the stage; a later change is said."""
        now = Execution(
            prefix=planned.prefix,
            micro_batch=planned.micro_batch,
            precision=config.train.precision,
            threads=config.train.threads,
            torch=ready.torch,
            machine=_machine(config, ready),
            onnxruntime=_runtime(planned.prefix, ready),
        )
        before = self._journal.execution(task.run, task.stage)
        if before == now:
            return []
        self._journal.fix_execution(task.run, task.stage, now)
        if before is None:
            text = f"stage {task.stage}: frozen layers by {now.prefix}, {counted(now.micro_batch, 'image')} at a time ({planned.reason})"
            return [Tell("planned", text, {"stage": task.stage, "prefix": now.prefix, "micro_batch": now.micro_batch})]
        was, is_now = (
            f"torch {one.torch} on {one.machine}, threads: {one.threads}, prefix: {_engine(one)}, micro-batch: {one.micro_batch}"
            for one in (before, now)
        )
        text = f"this stage began with {was} and goes on with {is_now} ({planned.reason}): its updates cannot be repeated bit for bit"
        return [Tell("warning", text)]

    def take_least(self, task: Task, config: RunConfig, why: str) -> list[Effect] | None:
        """From now on compute the stage with the least memory that it can take, and say so; None where it is done so already."""
        before = self._journal.execution(task.run, task.stage)
        if before is None:
            return []  # before anything was planned: perhaps others took the memory
        least = before.model_copy(update={"prefix": "torch", "onnxruntime": None, "micro_batch": _least_images(before, config)})
        train, reuses = config.train, config.plan(task.stage).frozen and config.train.views_per_round != "fresh"
        in_memory = bool(reuses) and train.features_in == "memory"
        if self._journal.takes_least(task.run, task.stage) or (least == before and not in_memory):
            return None
        self._journal.take_least(task.run, task.stage, least)
        changes = {
            f"frozen layers by torch instead of {before.prefix}": least.prefix != before.prefix,
            f"{counted(least.micro_batch, 'image')} at a time instead of {before.micro_batch}": least.micro_batch != before.micro_batch,
            "features of views that are used again in a file": in_memory,
        }
        text = f"stage {task.stage} goes on with the least memory, {why}: {', '.join(change for change, made in changes.items() if made)}"
        if least != before:
            text += "; its updates cannot be repeated bit for bit"
        return [Tell("warning", text, {"prefix": least.prefix, "micro_batch": least.micro_batch})]


def _least_images(before: Execution, config: RunConfig) -> int:
    """At a time. Backbones with statistics of the batch take it whole."""
    return before.micro_batch if config.model.backbone in CONVOLUTIONAL else min(before.micro_batch, LEAST_IMAGES)


def _runtime(prefix: PrefixEngine, ready: WorkerReady) -> str | None:
    return None if prefix == "torch" else ready.onnxruntime


def _engine(one: Execution) -> str:
    return one.prefix if one.onnxruntime is None else f"{one.prefix} of ONNX Runtime {one.onnxruntime}"


def _machine(config: RunConfig, ready: WorkerReady) -> str:
    beside = ready.accelerator if config.worker.device != "cpu" else None
    return ready.machine if beside is None else f"{ready.machine}, {beside}"
