"""How a device computes a stage is chosen once, since the bits of its updates depend on it: what the journal keeps of that."""

from __future__ import annotations

from typing import Any

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import RunConfig
from lwfed.console import counted
from lwfed.edge_agent.events import Effect, Tell, WorkerPlanned, WorkerReady
from lwfed.edge_agent.journal import Journal
from lwfed.wire.messages import Execution, Task


class Executions:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def fixed(self, task: Task, config: RunConfig, ready: WorkerReady) -> dict[str, Any] | None:
        """What an earlier round of the stage has fixed, where it was computed by the same program on the same machine."""
        before = self._journal.execution(task.run, task.stage)
        if before is None or (before.torch, before.machine) != (ready.torch, _machine(config, ready)):
            return None
        return {"prefix": before.prefix, "micro_batch": before.micro_batch}

    def fix(self, task: Task, config: RunConfig, ready: WorkerReady, planned: WorkerPlanned) -> list[Effect]:
        """Before the first step of the stage; a later change is said."""
        now = Execution(
            prefix=planned.prefix,
            micro_batch=planned.micro_batch,
            precision=config.train.precision,
            threads=config.train.threads,
            torch=ready.torch,
            machine=_machine(config, ready),
        )
        before = self._journal.execution(task.run, task.stage)
        if before == now:
            return []
        self._journal.fix_execution(task.run, task.stage, now)
        if before is None:
            text = f"stage {task.stage}: frozen layers by {now.prefix}, {counted(now.micro_batch, 'image')} at a time ({planned.reason})"
            return [Tell("planned", text, {"stage": task.stage, "prefix": now.prefix, "micro_batch": now.micro_batch})]
        was, is_now = (
            f"torch {one.torch} on {one.machine}, threads: {one.threads}, prefix: {one.prefix}, micro-batch: {one.micro_batch}"
            for one in (before, now)
        )
        text = f"this stage began with {was} and goes on with {is_now} ({planned.reason}): its updates cannot be repeated bit for bit"
        return [Tell("warning", text)]

    def take_less(self, task: Task, config: RunConfig, why: str) -> list[Effect] | None:
        """Plan half of the micro-batch for the next try, and say so; None where that is not possible."""
        before = self._journal.execution(task.run, task.stage)
        if before is None:
            return []  # before anything was planned: perhaps others took the memory
        if before.micro_batch == 1 or config.model.backbone in CONVOLUTIONAL:
            return None
        less = before.model_copy(update={"micro_batch": before.micro_batch // 2})
        self._journal.fix_execution(task.run, task.stage, less)
        text = (
            f"stage {task.stage} goes on with {counted(less.micro_batch, 'image')} at a time instead of {before.micro_batch}, {why}: "
            "its updates cannot be repeated bit for bit"
        )
        return [Tell("warning", text, {"micro_batch": less.micro_batch})]


def _machine(config: RunConfig, ready: WorkerReady) -> str:
    beside = ready.accelerator if config.worker.device != "cpu" else None
    return ready.machine if beside is None else f"{ready.machine}, {beside}"
