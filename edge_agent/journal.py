"""What a device remembers across a power cut.

Every method is one transaction of `facts`: it happened entirely or not at all.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, ValidationError

from lwfed.edge_agent.facts import Facts, SqliteFacts
from lwfed.errors import StateError
from lwfed.plan import PrefixEngine
from lwfed.wire.messages import BlobRef, Task
from lwfed.wire.records import Count, Name, Ordinal, Record
from lwfed.wire.report import Execution, Report, Traffic

Stored = TypeVar("Stored", bound=BaseModel)


class Update(Record):
    """A finished update that the server has not acknowledged; its tensors are blob `blob` of the spool."""

    task: Task
    blob: BlobRef
    chunk_bytes: int
    report: Report


class Failed(Record):
    """The last task in which training failed, and how often it did."""

    task: Task
    attempts: Ordinal


class Accepted(Record):
    """The last task whose update a server took, and in which of its starts."""

    task: Task
    epoch: Count


class Taken(Record):
    """The last rounds of a stage whose updates a server took, oldest first: as many as are needed to repeat one of them."""

    stage: Ordinal
    rounds: Annotated[tuple[Ordinal, ...], Field(min_length=1, max_length=2)]


class Planned(Record):
    """What the last plan of a stage says beside the execution: how the least memory is taken, should it run out."""

    least: PrefixEngine  # with few images at a time
    features_in_memory: bool


class Least(Record):
    """The last stage for which there was too little memory, computed as it was at first."""

    stage: Ordinal


class Seen(Record):
    """The newest announcement that was obeyed."""

    epoch: Count
    seq: Count

    def __lt__(self, other: Seen) -> bool:
        return (self.epoch, self.seq) < (other.epoch, other.seq)


class Baseline(Record):
    """The least that a training process has taken before it held data or a model."""

    torch: str
    mb: Annotated[float, Field(ge=0)]


class Identity(Record):
    device: Name
    boot: Count  # starts of the agent


class Journal:
    """Opening it counts as a start of the agent. Raises StateError when the file is unusable."""

    def __init__(self, facts: Path | Facts, name: str = "device", device: str | None = None) -> None:
        """`facts` are, or are kept in, the SQLite file of that path; `device` is the id of one that is enrolled."""
        self._facts = SqliteFacts(facts) if isinstance(facts, Path) else facts
        with self._facts.transaction():
            before = self._read("device", Identity) or Identity(device=device or _new_id(name), boot=0)
            if device not in (None, before.device):
                raise StateError(f"{self._facts.place} is that of device {before.device}, not of {device}: use another --name or --state")
            self.device, self.boot = before.device, before.boot + 1
            self._put("device", Identity(device=self.device, boot=self.boot))

    def close(self) -> None:
        self._facts.close()

    # The work of the present round

    @property
    def task(self) -> Task | None:
        """The task in progress, which a restart interrupts."""
        return self._read("task", Task)

    def begin(self, task: Task) -> None:
        with self._facts.transaction():
            self._put("task", task)

    def abandon(self) -> None:
        with self._facts.transaction():
            self._facts.drop("task")

    def fail(self, task: Task) -> int:
        """Training failed; how often it now has in this task."""
        known = self._read("failed", Failed)
        attempts = known.attempts + 1 if known is not None and known.task == task else 1
        with self._facts.transaction():
            self._put("failed", Failed(task=task, attempts=attempts))
        return attempts

    @property
    def update(self) -> Update | None:
        return self._read("update", Update)

    def finish(self, update: Update) -> None:
        """The task is done; what it made is kept until `settle`."""
        with self._facts.transaction():
            self._facts.drop("task")
            self._put("update", update)

    def settle(self, accepted: Accepted | None = None) -> None:
        """The server has the update, or does not want it."""
        with self._facts.transaction():
            self._facts.drop("update")
            if accepted is not None:
                self._put("accepted", accepted)
                self._take(accepted.task)

    @property
    def accepted(self) -> Accepted | None:
        return self._read("accepted", Accepted)

    def after(self, task: Task) -> int | None:
        """The last earlier round of the task's stage whose update a server took."""
        return max(self._earlier(task), default=None)

    def lose(self, run: str, stage: int, round: int) -> None:
        """The server is at that round: if it took an update in a later one, it has forgotten that, as when it was put back from a copy."""
        taken = self._read(f"taken {run}", Taken)
        if taken is not None and (taken.stage, taken.rounds[-1]) > (stage, round):
            with self._facts.transaction():
                self._facts.drop(f"taken {run}")

    def take(self, task: Task) -> None:
        """A server has the update of `task`."""
        with self._facts.transaction():
            self._take(task)

    def _take(self, task: Task) -> None:
        self._put(f"taken {task.run}", Taken(stage=task.stage, rounds=(*self._earlier(task)[-1:], task.round)))

    def _earlier(self, task: Task) -> tuple[int, ...]:
        taken = self._read(f"taken {task.run}", Taken)
        return tuple(round for round in taken.rounds if round < task.round) if taken and taken.stage == task.stage else ()

    def execution(self, run: str, stage: int) -> Execution | None:
        """How this device computes in the stage, fixed before its first step there."""
        return self._read(f"execution {run} {stage}", Execution)

    def planned(self, run: str, stage: int) -> Planned | None:
        """With the execution; None too where that is of a program that did not keep it."""
        return self._read(f"planned {run} {stage}", Planned)

    def fix_execution(self, run: str, stage: int, execution: Execution, planned: Planned) -> None:
        if (execution, planned) == (self.execution(run, stage), self.planned(run, stage)):
            return
        with self._facts.transaction():
            self._put(f"execution {run} {stage}", execution)
            self._put(f"planned {run} {stage}", planned)

    def takes_least(self, run: str, stage: int) -> bool:
        """Whether the stage is computed with the least memory, since there was too little for another execution."""
        return self._read(f"least {run}", Least) == Least(stage=stage)

    def take_least(self, run: str, stage: int, execution: Execution) -> None:
        """From now on it is `execution`."""
        with self._facts.transaction():
            self._put(f"least {run}", Least(stage=stage))
            self._put(f"execution {run} {stage}", execution)

    def baseline_mb(self, torch: str) -> float | None:
        """What training processes with this version of torch take here at least; None before there was one."""
        known = self._read("baseline", Baseline)
        return known.mb if known and known.torch == torch else None

    def note_baseline(self, torch: str, mb: float) -> None:
        known = self.baseline_mb(torch)
        if known is None or mb < known:
            with self._facts.transaction():
                self._put("baseline", Baseline(torch=torch, mb=mb))

    # The connection

    @property
    def seen(self) -> Seen:
        return self._read("seen", Seen) or Seen(epoch=0, seq=0)

    def saw(self, seen: Seen) -> None:
        with self._facts.transaction():
            self._put("seen", seen)

    def traffic(self, run: str) -> Traffic:
        return self._read(f"traffic {run}", Traffic) or Traffic(down=0, up=0)

    def count(self, run: str, traffic: Traffic) -> None:
        with self._facts.transaction():
            self._put(f"traffic {run}", traffic)

    def keep_run(self, run: str) -> None:
        """Forget what is known of other runs."""
        with self._facts.transaction():
            for key in self._facts.names():
                about = key.split(" ")
                if len(about) > 1 and about[1] != run:
                    self._facts.drop(key)

    def _read(self, key: str, model: type[Stored]) -> Stored | None:
        text = self._facts.get(key)
        try:
            return None if text is None else model.model_validate_json(text)
        except ValidationError:
            raise StateError(f"{self._facts.place}: {key} does not parse; move the file away to start over as a new device") from None

    def _put(self, key: str, fact: BaseModel) -> None:
        self._facts.put(key, fact.model_dump_json())


def _new_id(name: str) -> str:
    """Random, so that it says nothing about the device; beginning with the agent's name, so that people can tell them apart."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "device"
    return f"{readable}-{secrets.token_hex(4)}"
