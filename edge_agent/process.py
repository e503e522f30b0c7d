"""The training process as its agent sees it: a child with a meter on its memory; what it says becomes events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lwfed.child import Child, Ended, Json, Said
from lwfed.edge_agent import events
from lwfed.edge_agent.resources import Meter, share_mb
from lwfed.wire.report import Accelerator

WORKER = "lwfed.edge_agent.worker"
ENVIRONMENT = {"MIMALLOC_PURGE_DELAY": "0"}  # of torch's allocator on ARM, read before Python runs: free memory goes back at once

FromChild = Said | Ended


class TrainingProcess:
    """`deliver` takes what the child says, from a thread of its own, and only enqueues it for `hear`."""

    def __init__(self, deliver: Callable[[FromChild], None], threads: int) -> None:
        self._child = Child(WORKER, deliver, {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)})
        self._meter = Meter(self._child.process)
        self._sample_s = 0.0
        self.next_sample: float | None = None  # by time.monotonic, while a task runs

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def baseline_mb(self) -> float:
        """Of memory, with its imports made and neither data nor model; 0 before it is ready."""
        return self._meter.baseline_mb

    def train(self, order: Mapping[str, Any], sample_s: float) -> None:
        """The order's `budget_mb` is for both processes: the child, whose high-water mark counts, is told what this one's share leaves."""
        now = time.monotonic()
        self._meter.begin(now)
        self._sample_s, self.next_sample = sample_s, now + sample_s
        budget_mb = order["budget_mb"]
        self._child.send({**order, "budget_mb": None if budget_mb is None else max(0.0, budget_mb - share_mb())})

    def sample(self) -> None:
        """Read its memory if that is due."""
        if self.next_sample is not None and time.monotonic() >= self.next_sample:
            self._meter.sample(time.monotonic())
            self.next_sample = time.monotonic() + self._sample_s

    def speaks(self, said: FromChild) -> bool:
        """Whether `said` is of this process, and not of one before it that was ended on purpose."""
        return said.child is self._child

    def hear(self, said: FromChild) -> events.WorkerEvent | None:
        """What the session understands of it."""
        if isinstance(said, Said):
            return self._translate(said.data)
        self._child.close()
        self.next_sample = None
        return events.WorkerError(said.kind, f"the training process {said.reason}")

    def end(self) -> None:
        self._child.kill()
        self._child.close()

    def _translate(self, data: Json) -> events.WorkerEvent | None:
        said = {name: value for name, value in data.items() if name != "event"}
        match data["event"]:
            case "ready":
                self._meter.take_baseline()
                return events.WorkerReady(**said)
            case "loading":
                return events.WorkerLoading(**said)
            case "patched":
                return events.WorkerPatched(tuple(Path(file) for file in data["files"]))
            case "warning":
                return events.WorkerWarning(**said)
            case "planned":
                return events.WorkerPlanned(**said)
            case "recomputes":
                return events.WorkerRecomputes(**said)
            case "progress":
                return events.WorkerProgress(**said, rss_mb=round(self._meter.rss_mb, 2))
            case "over":
                return events.WorkerOver(**said)
            case "done":
                self.next_sample = None
                accelerated = said.pop("accelerator")
                memory = self._meter.finish(time.monotonic())
                if accelerated is not None:
                    memory = memory.model_copy(update={"accelerator": Accelerator(**accelerated)})
                return events.WorkerDone(**{**said, "file": Path(data["file"]), "losses": tuple(data["losses"])}, memory=memory)
            case "error":
                self.next_sample = None
                return events.WorkerError(**said)
        return None
