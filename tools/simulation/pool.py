"""A few training processes that work for all simulated devices: those of the agent, each for one task at a time.

As on a device a process lives as long as the stage, so that what it measures of its memory is what a device's would.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from lwfed.child import END_KINDS
from lwfed.config import RunConfig
from lwfed.edge_agent.events import WorkerDone, WorkerError, WorkerEvent, WorkerReady
from lwfed.edge_agent.process import FromChild, TrainingProcess
from lwfed.errors import WorkerFailed

OURS = (*END_KINDS, "OutOfMemory", "WorkerFailed")  # errors that are of this machine and not of what is simulated

Client = Hashable
Post = Callable[[Any, WorkerEvent], None]
Rank = Callable[[Mapping[str, Any]], int]  # of an order


@dataclass(frozen=True)
class Job:
    client: Client
    order: Mapping[str, Any]
    sample_s: float

    @property
    def stage(self) -> int:
        return int(self.order["stage"])


@dataclass
class Seat:
    process: TrainingProcess
    ready: bool = False
    stage: int | None = None  # of what it has trained
    job: Job | None = None  # under way


class Pool:
    """`workers` processes at most; None: one on an accelerator, else as many as there are cores for their threads.

    `deliver` enqueues what processes say, for `hear`; `post` hands a client the events of its worker. With `rank`, results
    wait until all are there and are posted by `release`, lowest first: which process was faster must not show.
    """

    def __init__(
        self, config: RunConfig, workers: int | None, deliver: Callable[[FromChild], None], post: Post, rank: Rank | None = None
    ) -> None:
        self._config, self._workers, self._deliver, self._post, self._rank = config, workers, deliver, post, rank
        self._results: list[tuple[Job, WorkerDone]] = []
        self._seats: list[Seat] = []
        self._queue: deque[Job] = deque()
        self._ready: WorkerReady | None = None  # what all processes say of themselves
        self._greeting: list[Client] = []  # those who wait for that

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._greeting or any(seat.job for seat in self._seats))

    def greet(self, client: Client) -> None:
        """Post `client` what a worker of its own would say when it is ready."""
        if self._ready is not None:
            self._post(client, self._ready)
            return
        self._greeting.append(client)
        if not self._seats:
            self._open()

    def submit(self, client: Client, order: Mapping[str, Any], sample_s: float) -> None:
        self._queue.append(Job(client, order, sample_s))
        self._fill()

    def cancel(self, client: Client) -> None:
        """Do no more for `client`; what is under way ends with its process, as on a device."""
        self._greeting = [one for one in self._greeting if one != client]
        self._queue = deque(job for job in self._queue if job.client != client)
        self._results = [one for one in self._results if one[0].client != client]
        for seat in [seat for seat in self._seats if seat.job and seat.job.client == client]:
            self._close(seat)

    def hear(self, said: FromChild) -> None:
        """Raises WorkerFailed for what a device cannot be blamed for."""
        seat = next((seat for seat in self._seats if seat.process.speaks(said)), None)
        if seat is None or (event := seat.process.hear(said)) is None:
            return
        match event:
            case WorkerReady():
                seat.ready, self._ready = True, event
                waiting, self._greeting = self._greeting, []
                for client in waiting:
                    self._post(client, event)
            case WorkerError(kind, message) if kind in OURS:
                raise WorkerFailed(f"a simulated device could not train: {message}; take fewer --workers if memory is short")
            case _:
                assert seat.job is not None
                if self._rank is not None and isinstance(event, WorkerDone):
                    self._results.append((seat.job, event))
                else:
                    self._post(seat.job.client, event)
                if isinstance(event, WorkerDone | WorkerError):
                    seat.job = None
        self._fill()

    def release(self) -> bool:
        """Post the next result that waited for all others; whether there was one."""
        if self._rank is None or not self._results or self.busy:
            return False
        rank = self._rank
        first = min(self._results, key=lambda one: rank(one[0].order))
        self._results.remove(first)
        self._post(first[0].client, first[1])
        return True

    def sample(self) -> None:
        for seat in self._seats:
            seat.process.sample()

    @property
    def next_sample(self) -> float | None:
        """By time.monotonic."""
        return min((seat.process.next_sample for seat in self._seats if seat.process.next_sample is not None), default=None)

    def end(self) -> None:
        """Idempotent."""
        for seat in list(self._seats):
            self._close(seat)

    def _open(self) -> None:
        self._seats.append(Seat(TrainingProcess(self._deliver, self._config.train.threads)))

    def _close(self, seat: Seat) -> None:
        self._seats.remove(seat)
        seat.process.end()

    def _capacity(self) -> int:
        if self._ready is None:
            return 1
        if self._workers is not None:
            return self._workers
        on_accelerator = self._ready.accelerator is not None and self._config.worker.device != "cpu"
        return 1 if on_accelerator else max(1, (os.cpu_count() or 1) // self._config.train.threads)

    def _fill(self) -> None:
        for seat in [seat for seat in self._seats if seat.ready and seat.job is None]:
            if not self._queue:
                return
            if seat.stage not in (None, self._queue[0].stage):
                self._close(seat)
                continue
            seat.job = self._queue.popleft()
            seat.stage = seat.job.stage
            seat.process.train(seat.job.order, seat.job.sample_s)
        starting = sum(not seat.ready for seat in self._seats)
        for _ in range(min(self._capacity() - len(self._seats), len(self._queue) - starting)):
            self._open()
