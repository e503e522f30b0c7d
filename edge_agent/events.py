"""What happens to a device's session, and what it wants done. The transport's events and commands come on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lwfed.child import END_KINDS
from lwfed.errors import LwfedError
from lwfed.plan import PrefixEngine
from lwfed.transport.base import Event as TransportEvent
from lwfed.wire.commands import Command
from lwfed.wire.report import Memory

# In


@dataclass(frozen=True)
class WorkerReady:
    """The training process has made its imports."""

    torch: str
    machine: str
    accelerator: str | None = None  # what it finds beside the processor
    onnxruntime: str | None = None  # version; None where it is not installed


READING, VIEWS = "reading images", "computing views that are used again"


@dataclass(frozen=True)
class WorkerLoading:
    """It makes what it will use more than once."""

    what: str  # READING or VIEWS
    done: int
    total: int


@dataclass(frozen=True)
class WorkerPlanned:
    """How it computes this task."""

    prefix: PrefixEngine
    micro_batch: int
    reason: str  # for people
    needs_mb: float  # with so much for itself, the training process would plan the same
    least: PrefixEngine = "torch"  # that of the least memory, with the fewest images at a time
    features_in_memory: bool = False  # of views that are used again


@dataclass(frozen=True)
class WorkerRecomputes:
    """It cannot go on from what it has kept for views that are used again."""

    why: str  # for people


@dataclass(frozen=True)
class WorkerProgress:
    epoch: int  # 1-based
    epochs: int
    step: int  # of the whole task, 1-based
    steps: int
    loss: float
    rss_mb: float


@dataclass(frozen=True)
class WorkerOver:
    """It has taken more than its budget; said once a task."""

    peak_mb: float
    budget_mb: float


@dataclass(frozen=True)
class WorkerDone:
    file: Path  # the update
    images: int
    skipped: int
    steps: int
    losses: tuple[float, ...]  # mean per epoch
    seconds: float
    memory: Memory


@dataclass(frozen=True)
class WorkerError:
    """It raised, or its process ended."""

    kind: str  # class name of the exception, or how it ended: one of END_KINDS
    message: str

    @property
    def ended(self) -> bool:
        return self.kind in END_KINDS


@dataclass(frozen=True)
class Stop:
    """Somebody wants the agent to end."""


@dataclass(frozen=True)
class WorkerPatched:
    """It has made parts of the model of what was sent of them; the files are its parent's now."""

    files: tuple[Path, ...]


@dataclass(frozen=True)
class WorkerWarning:
    """For people; it goes on."""

    text: str


WorkerEvent = (
    WorkerReady
    | WorkerPatched
    | WorkerWarning
    | WorkerLoading
    | WorkerPlanned
    | WorkerRecomputes
    | WorkerProgress
    | WorkerOver
    | WorkerDone
    | WorkerError
)
Event = TransportEvent | WorkerEvent | Stop

# Out


@dataclass(frozen=True)
class StartWorker:
    threads: int


@dataclass(frozen=True)
class Train:
    order: Mapping[str, Any]  # what `lwfed.edge_agent.worker` reads
    sample_s: float


@dataclass(frozen=True)
class EndWorker:
    pass


@dataclass(frozen=True)
class Tell:
    """For people: one line."""

    event: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Show:
    """For people at a terminal: how far it is."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Exit:
    error: LwfedError | None = None


Effect = Command | StartWorker | Train | EndWorker | Tell | Show | Exit
