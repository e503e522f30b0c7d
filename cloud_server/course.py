"""The run on this server: coordinator, store and blobs, moved together by one event at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lwfed.blobs import BlobStore
from lwfed.child import Json
from lwfed.cloud_server.checkpoint import choose, export
from lwfed.cloud_server.coordinator import advance
from lwfed.cloud_server.events import Aggregated, Calibrated, Event
from lwfed.cloud_server.identity import accept
from lwfed.cloud_server.merge import Merged
from lwfed.cloud_server.notices import Begun, Closed, Collapsed, Joined, Notice
from lwfed.cloud_server.patches import Published, publish
from lwfed.cloud_server.rounds import Rules, State
from lwfed.cloud_server.sizes import update_bytes
from lwfed.cloud_server.store import Step, Store, bind_folder, open_store
from lwfed.cloud_server.weights import check
from lwfed.config import RunConfig
from lwfed.plan import GraphEngine, StagePlan
from lwfed.seeds import derive
from lwfed.wire.messages import BlobRef, Patch, Run
from lwfed.wire.sizes import Shapes, stated_shapes

Write = Callable[[Step], None]
Name = TypeVar("Name", bound=str)
MODEL_FOLDER = "model"


class Course:
    def __init__(
        self,
        config: RunConfig,
        root: Path,
        clock: Callable[[], float] = time.time,
        durable: bool = True,
        database: str | None = None,
        store: Store | None = None,
        least_epoch: int = 0,
    ) -> None:
        """Begin the run below `root`, or take it up again; `clock` gives Unix time, `database` an address. Raises StateError.

        `store` is used instead of one that is opened; the epoch is `least_epoch` at least.
        """
        self.config = config
        self.root = root
        self.clock = clock
        self.rules = Rules.of(config)
        self.store = store or open_store(root, config.run.name, database, clock, durable)
        try:
            stored = self.store.config
            self.changed = [] if stored is None else accept(root, stored, config)  # settings that are new since the last start
            begun = self.store.begin(config, least_epoch)
            self.run_id, self.epoch, self.resumed, self.state = begun.id, begun.epoch, begun.resumed, begun.state
            bind_folder(root, self.store)
            self.blobs = BlobStore(root / MODEL_FOLDER, durable)  # served to everybody who asks: nothing of a device belongs here
            self.spool = BlobStore(root / "updates", durable)
            self.config_ref = self.blobs.put(config.to_bytes())
        except BaseException:
            self.store.close()
            raise
        self._shapes: dict[str, Shapes] = {}  # by part, of those that were foreseen or looked up: they never change
        self._seq = 0

    @property
    def plan(self) -> StagePlan:
        return self.config.plan(self.state.stage)

    @property
    def lr_scale(self) -> float:
        """What plateaus have left of the learning rate in the present round."""
        return self.rules.lr_scale(self.state)

    @property
    def encoder_path(self) -> Path:
        return self.root / "encoder.safetensors"

    def apply(self, event: Event, now: float, write: Write | None = None) -> list[Notice]:
        """Take `event`; it and what it causes (with `write`) are on disk when this returns, but for who is here and who is away."""
        before = self.state
        after, notices = advance(self.rules, before, event, now)
        if after == before and write is None:
            return notices
        if write is None and not notices and _differ_by_sight_only(before, after):
            self.state = after
            return []
        with self.store.step(after) as step:
            if write:
                write(step)
            for notice in notices:
                _record(step, before, after, notice)
            if isinstance(event, Aggregated | Calibrated) and after.phase != "calibrating":
                step.checkpoint(before.stage, before.round, {**before.parts, **event.parts})
        self.state = after
        if isinstance(event, Aggregated):
            self.spool.forget(())  # the next round may begin at once, and its updates with it
        return notices

    def tidy(self) -> None:
        """Delete what nobody will ask for any more."""
        state = self.state
        models = [state.parts, state.start, state.announced, state.residuals, *self.store.checkpoints().values()]
        ways = (blob for steps in state.patches.values() for step in steps for blob in step)  # simulated devices borrow the bases
        self.blobs.forget({self.config_ref.id, *state.graphs.values(), *ways, *(blob for parts in models for blob in parts.values())})
        if self.state.phase not in ("training", "aggregating") and not self.state.suspended:
            self.spool.forget(())

    def announcement(self) -> Run:
        """Each is newer than all before it, also than those of earlier starts."""
        self._seq += 1
        state = self.state
        return Run(
            run=self.run_id,
            epoch=self.epoch,
            seq=self._seq,
            phase=state.phase,
            stage=state.stage,
            stages=self.rules.stages,
            round=state.round,
            rounds=self.rules.last_round(state.stage, state.round),
            lr_scale=self.lr_scale,
            paused=state.paused,
            config=self.config_ref,
            parts={part: self.blobs.ref(blob) for part, blob in state.parts.items()},
            patches={part: self._patches(steps) for part, steps in state.patches.items()} if state.phase == "training" else {},
            graphs=self.graphs if state.phase == "training" and self.plan.frozen_layers else {},
        )

    @property
    def graphs(self) -> dict[GraphEngine, BlobRef]:
        """Those that there are: training goes on without them, and what a disk has lost is made again with the next stage."""
        return {engine: self.blobs.ref(blob) for engine, blob in self.state.graphs.items() if self.blobs.has(blob)}

    def _patches(self, steps: tuple[tuple[str, str], ...]) -> tuple[Patch, ...]:
        """Those after the last one that the disk has lost: who needs that one takes the whole part."""
        held: list[Patch] = []
        for base, blob in steps:
            held = [*held, Patch(base=base, blob=self.blobs.ref(blob))] if self.blobs.has(blob) else []
        return tuple(held)

    @property
    def shapes(self) -> Mapping[str, Shapes]:
        """Part -> its tensors, as far as parts exist or are foreseen."""
        for part in self.state.parts.keys() - self._shapes.keys():
            self._shapes[part] = stated_shapes(self.blobs.path(self.state.parts[part]))
        return self._shapes

    def foresee(self, shapes: Mapping[str, Shapes]) -> None:
        """`shapes`: part -> its tensors, of all parts that the run will ever have."""
        self._shapes.update(shapes)

    def update_limit(self) -> int:
        """The largest update that can be one of this stage, in bytes; 0 while parts of it are not known."""
        uploaded, shapes = self.plan.uploaded, self.shapes
        return update_bytes(uploaded, self.config.transfer.codec, shapes) if shapes.keys() >= set(uploaded) else 0

    def check_update(self, path: Path) -> None:
        """Raises InvalidPayload unless the file holds what this stage uploads."""
        check(self.config.transfer, self._files(self.plan.uploaded).values(), path)

    def to_merge(self) -> Json:
        """What the worker has to make one model of. Updates that the disk has spoilt are left out: their devices keep them no more."""
        received = self.store.contributions(self.state.stage, self.state.round)
        counted = [one for one in received if self.state.contributed.get(one.participant) == one.id]
        return {
            "parts": self.files({part: self.state.parts[part] for part in self.plan.uploaded}),
            "updates": [
                [one.participant, one.report.images, str(self.spool.path(one.blob))] for one in counted if self.spool.has(one.blob)
            ],
            "lost": [one.participant for one in counted if not self.spool.has(one.blob)],
        }

    def aggregated(self, merged: Merged) -> Aggregated:
        """The round's contributions, which the worker has made one model."""
        parts, loss = self.adopt(dict(merged.parts)), self._loss(merged.counted)
        if self.rules.calibrates(replace(self.state, losses={**self.state.losses, self.state.round: loss})):
            return Aggregated(parts, loss)  # devices get what calibration makes of it
        return Aggregated(**vars(self._publish(parts)), loss=loss)

    def _loss(self, counted: Collection[int]) -> float:
        """The mean by images; by rules that believe no single device the median of those that count."""
        stage, round = self.state.stage, self.state.round
        losses = [one.report.losses[-1] for one in self.store.contributions(stage, round) if one.participant in counted]
        if losses and self.config.aggregation.rule not in ("mean", "l_dawa"):
            return statistics.median(losses)
        mean = self.store.loss(stage, round)
        assert mean is not None
        return mean

    def calibrated(self, files: dict[str, str]) -> Calibrated:
        """The round's model, with the parts that the worker has trained."""
        return Calibrated(**vars(self._publish({**self.state.parts, **self.adopt(files)})))

    def _publish(self, parts: dict[str, str]) -> Published:
        state = self.state
        seed = derive(self.config.run.seed, "publish", state.stage, state.round)
        return publish(self.config.transfer, self.blobs, state.announced, parts, state.residuals, seed)

    def adopt(self, files: dict[Name, str]) -> dict[Name, str]:
        """Take over what the worker wrote: part -> file becomes part -> blob, and so with graphs."""
        return {name: self.blobs.adopt(Path(file)).id for name, file in files.items()}

    def files(self, parts: dict[str, str]) -> dict[str, str]:
        """Part -> path, for the worker."""
        return {part: str(self.blobs.path(blob)) for part, blob in parts.items()}

    def _files(self, parts: Iterable[str]) -> dict[str, Path]:
        return {part: self.blobs.path(self.state.parts[part]) for part in parts}

    def export(self) -> Path | None:
        """The encoder that the run ends with, as a file; None when its first stage was its last and collapsed."""
        if not self.state.sound_stage:
            return None
        stage, parts = choose(self.store.checkpoints(), self.state.sound_stage)
        export(self.config, stage, parts, self.blobs.path, self.encoder_path)
        return self.encoder_path


def _differ_by_sight_only(before: State, after: State) -> bool:
    """In what a server sees anew after a start: which of its devices are here and which away, and when that is due to change."""
    if (before.due is None) != (after.due is None) or _gone(before) != _gone(after):
        return False
    return replace(after, devices=before.devices, due=before.due) == before


def _gone(state: State) -> dict[int, bool]:
    return {one: there == "gone" for one, there in state.devices.items()}


def _record(step: Step, before: State, after: State, notice: Notice) -> None:
    match notice:
        case Begun() | Joined():
            step.begin_round(after.stage, after.round, after.chosen)
        case Closed(stage, round):
            step.close_round(stage, round)
        case Collapsed(stage, _, "repeat"):
            step.forget_checkpoint(stage)
