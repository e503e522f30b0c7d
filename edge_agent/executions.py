"""How a device computes a stage is chosen once, since the bits of its updates depend on it: what the journal keeps of that."""

from __future__ import annotations

from typing import Any

from lwfed.config import RunConfig
from lwfed.console import counted
from lwfed.edge_agent.events import Effect, Tell, WorkerPlanned, WorkerReady
from lwfed.edge_agent.journal import Journal, Planned
from lwfed.edge_agent.least import least_images
from lwfed.plan import PrefixEngine
from lwfed.wire.messages import Task
from lwfed.wire.report import Execution


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
        self._journal.fix_execution(task.run, task.stage, now, Planned(least=planned.least, features_in_memory=planned.features_in_memory))
        if before == now:
            return []
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
        planned = self._journal.planned(task.run, task.stage)
        least = before.model_copy(update={"micro_batch": least_images(config, before.micro_batch, config.train.batch_size)})
        if planned is None or planned.least == "torch":
            least = least.model_copy(update={"prefix": "torch", "onnxruntime": None})
        in_memory = _may_keep_features(config, task.stage) if planned is None else planned.features_in_memory
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


def _may_keep_features(config: RunConfig, stage: int) -> bool:
    """In memory."""
    train = config.train
    return bool(config.plan(stage).frozen) and train.views_per_round != "fresh" and train.features_in == "memory"


def _runtime(prefix: PrefixEngine, ready: WorkerReady) -> str | None:
    return None if prefix == "torch" else ready.onnxruntime


def _engine(one: Execution) -> str:
    return one.prefix if one.onnxruntime is None else f"{one.prefix} of ONNX Runtime {one.onnxruntime}"


def _machine(config: RunConfig, ready: WorkerReady) -> str:
    beside = ready.accelerator if config.worker.device != "cpu" else None
    return ready.machine if beside is None else f"{ready.machine}, {beside}"
