"""A finished update, from the worker's file until the server has it or does not want it.

It is journalled before it is offered and kept until the server's word, so it survives everything but a broken disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lwfed.blobs import BlobStore
from lwfed.edge_agent.events import Effect, Show, Tell
from lwfed.edge_agent.journal import Accepted, Journal, Update
from lwfed.errors import ConfigError, StateError
from lwfed.seeds import derive
from lwfed.wire.messages import Done, Grant, Miss, Offer, Refuse, Run, Task, Wait
from lwfed.wire.report import Report, Traffic
from lwfed.wire.topics import Topics
from lwfed.wire.upload import Upload, contribution_id, fitting_chunk_bytes

Answer = Grant | Wait | Miss | Done | Refuse


class Link(Protocol):
    """What a session reads off its transport."""

    received_bytes: int
    sent_bytes: int
    packet_limit: int | None

    @property
    def pending(self) -> int: ...


class Handover:
    def __init__(self, device: str, topics: Topics, journal: Journal, spool: BlobStore, link: Link) -> None:
        self._device, self._topics, self._journal, self._spool, self._link = device, topics, journal, spool, link
        self._upload: Upload | None = None
        self._epoch = 0  # of the server, once it was met
        self.update: Update | None = journal.update  # what is being handed over

    def recall(self) -> list[Effect]:
        """After a start: offer again what the journal holds."""
        update = self.update
        self._spool.forget({update.blob.id} if update else set())
        if update is None:
            return []
        if damaged := self._offer(update):
            return damaged
        return [Tell("update", f"an update of {where(update.task)} is waiting to be handed over", {"bytes": update.blob.size})]

    def fitting(self, size: int, chunk_bytes: int, epochs: int) -> int:
        """In what pieces an update of `size` bytes can travel, at most `chunk_bytes`. Raises ConfigError when it cannot."""
        try:
            return fitting_chunk_bytes(size, chunk_bytes, epochs, self._link.packet_limit)
        except ConfigError as error:
            raise ConfigError(f"the update cannot be handed over: {error}") from None

    def begin(self, task: Task, file: Path, report: Report, chunk_bytes: int) -> list[Effect]:
        """Take the worker's `file` over. Raises StateError when the disk does not, and ConfigError when it cannot travel."""
        blob = self._spool.adopt(file)
        try:
            chunk_bytes = self.fitting(blob.size, chunk_bytes, len(report.losses))
        except ConfigError:  # before the journal has it: one that cannot be offered would bar every start
            self._spool.remove(blob.id)
            raise
        update = Update(task=task, blob=blob, chunk_bytes=chunk_bytes, report=report)
        self._journal.finish(update)
        self.update = update
        fields = {"bytes": update.blob.size, "contribution": self._contribution(update), "loss": report.losses[-1]}
        return [Tell("update", _summary(update), fields), *self._offer(update)]

    def answer(self, message: Answer) -> list[Effect]:
        """The server's word on the update; words on others are ignored."""
        if self._upload is None:
            return []
        match message:
            case Grant():
                self._upload.on_grant(message)
            case Wait():
                self._upload.on_wait(message)
            case Miss():
                self._upload.on_miss(message)
            case Done():
                self._upload.on_done(message)
            case Refuse():
                self._upload.on_refuse(message)
        if self._upload.state == "done":
            task = self._settle(accepted=True).task
            return [Tell("accepted", f"the server has the update of {where(task)}", {"stage": task.stage, "round": task.round})]
        if self._upload.state == "refused" and (refusal := self._upload.refusal):
            self._settle()
            text = f"the server refused the update ({refusal.code}): {refusal.reason}; it is dropped"
            return [Tell("refused", text, {"code": refusal.code})]
        return []

    def covers(self, task: Task) -> bool:
        """Whether its update is on the way, or accepted by the server in its present start; a server that lost it starts anew."""
        if self.update is not None and self.update.task == task:
            return True
        return self._journal.accepted == Accepted(task=task, epoch=self._epoch)

    def reset(self, epoch: int) -> list[Effect]:
        """Connection or server are back; the broker may take smaller packets than when the update was cut."""
        self._epoch = epoch
        self.ask()
        if (update := self.update) is None:
            return []
        try:
            chunk_bytes = self.fitting(update.blob.size, update.chunk_bytes, len(update.report.losses))
        except ConfigError as error:  # kept, it would bar every later round
            self._settle()
            return [Tell("warning", f"the update of {where(update.task)} is dropped: {error}")]
        if chunk_bytes < update.chunk_bytes:
            self.update = update.model_copy(update={"chunk_bytes": chunk_bytes})
            return self._offer(self.update)
        return []

    def ask(self) -> None:
        """Ask the server at once whether it has the update: when a new round begins it may have taken it, and its word be lost."""
        if self._upload is not None:
            self._upload.reset()

    def poll(self, now: float, traffic: Traffic) -> list[Effect]:
        if self._upload is None:
            return []
        try:
            effects: list[Effect] = list(self._upload.poll(now, self._upload.window - self._link.pending, traffic))
        except StateError as error:
            return self._drop_damaged(error)
        if self._upload.state == "sending":
            effects.append(Show("sending the update", *self._upload.progress()))
        return effects

    def next_wakeup(self, now: float) -> float | None:
        return self._upload.next_wakeup(now) if self._upload else None

    def _offer(self, update: Update) -> list[Effect]:
        """Nothing is to be done for it, unless the disk has spoilt the update."""
        task = update.task
        try:
            manifest = self._spool.manifest(update.blob.id, update.chunk_bytes)
        except StateError as error:
            return self._drop_damaged(error)
        offer = Offer(
            contribution=self._contribution(update),
            run=task.run,
            stage=task.stage,
            round=task.round,
            participant=task.participant,
            manifest=manifest,
            report=update.report,
        )
        self._upload = Upload(self._topics, self._device, offer, self._spool, seed=derive(0, "upload", self._device))
        return []

    def _drop_damaged(self, error: StateError) -> list[Effect]:
        """What `error` says may be of the disk alone: then it is raised, and the update is kept."""
        update = self.update
        assert update is not None
        if self._spool.has(update.blob.id):
            raise error
        self._settle()
        return [Tell("warning", f"the update of {where(update.task)} was damaged on disk; it is made again if the server asks")]

    def _contribution(self, update: Update) -> str:
        return contribution_id(update.task.run, update.task.stage, update.task.round, self._device, update.blob.id)

    def _settle(self, accepted: bool = False) -> Update:
        update = self.update
        assert update is not None
        self._journal.settle(Accepted(task=update.task, epoch=self._epoch) if accepted else None)
        self._spool.remove(update.blob.id)
        self._upload = self.update = None
        return update


def _summary(update: Update) -> str:
    report = update.report
    skipped = f" ({report.skipped} unreadable)" if report.skipped else ""
    return (
        f"{where(update.task)} took {report.seconds:.1f} s: loss {report.losses[-1]:.4f} over {report.images} images{skipped}, "
        f"peak memory {report.memory.peak_mb:.0f} MB ({report.memory.baseline_mb:.0f} MB before training); "
        f"sending {megabytes(update.blob.size)}"
    )


def where(at: Task | Run) -> str:
    return f"stage {at.stage}, round {at.round}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
