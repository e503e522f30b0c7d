"""A task with everything that it needs, and the training process for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lwfed.config import RunConfig
from lwfed.edge_agent.ways import Way
from lwfed.wire.messages import Run, Task


@dataclass(frozen=True)
class WorkerFor:
    """What a worker was started for; anything else gets a new one, since only its end gives all memory back."""

    run: str
    stage: int
    threads: int


@dataclass(frozen=True)
class Job:
    task: Task
    run: Run
    config: RunConfig
    ways: Mapping[str, Way]

    @property
    def worker(self) -> WorkerFor:
        return WorkerFor(self.task.run, self.task.stage, self.config.train.threads)
