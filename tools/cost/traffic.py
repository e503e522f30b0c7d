"""Bytes that one device receives and sends over a run, counted as its transport does: in MQTT packets of the messages themselves.

A device holds what it has fetched, by content, so a part travels down when it has changed since: whole, or with the codecs
int8 and bf16 as differences, which are counted before compression. This device is chosen in every round, is never away and
loses nothing. Left out is what depends on how long things take: readings of the memory curve in a report beyond the first and
the last (100 bytes each, up to 118), reports of progress beyond the first (200 bytes, every 10 s), and reminders. Limits of
size are not minded: `obstacle` tells of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from lwfed.cloud_server.coordinator import KEPT_PATCHES
from lwfed.cloud_server.rounds import Rules, State
from lwfed.cloud_server.sizes import run_chunk_bytes
from lwfed.cloud_server.store import new_id
from lwfed.config import RunConfig
from lwfed.errors import ConfigError
from lwfed.models.shapes import Shape, part_shapes, shapes
from lwfed.plan import GraphEngine, StagePlan, in_model_order
from lwfed.transport.packets import publish_bytes
from lwfed.wire import messages as m
from lwfed.wire import report, tensors
from lwfed.wire.ranges import ranges
from lwfed.wire.sizes import packed_bytes
from lwfed.wire.topics import Topics

CONFIG = "config"  # fetched as parts are
GRAPHS: Mapping[GraphEngine, int] = {
    "onnx": 1976,
    "onnx_int8": 2230,
}  # bytes, for width 192; some more or less for others
DIGEST = "0" * 64
START = m.Start(boot=1, nonce="0" * 16)
DEVICE, CONTRIBUTION, WORKER = "device-00000000", DIGEST[:32], "w0"
COUNT, REAL = 1_000_000, 1234.56  # as long, in digits, as what stands there
LOSS = 1.2345678901234567
READING = report.Reading(t_s=REAL, rss_mb=REAL, uss_mb=REAL, swap_mb=0.0, available_mb=REAL)
MEMORY = report.Memory(baseline_mb=REAL, peak_mb=REAL, peak_source="VmHWM", curve=(READING, READING))
MACHINE = report.Execution(prefix="torch", micro_batch=16, precision="fp32", threads=1, torch="2.0.0+cpu", machine="x86_64 AVX512")


@dataclass(frozen=True)
class Traffic:
    """Of one device in one stage, in bytes."""

    down: int
    up: int
    joining: int  # down: what a device that holds nothing fetches before its first round in this stage


def bytes_of(config: RunConfig, parts: Iterable[str]) -> int:
    """The blob of `parts`, whole."""
    return _blob_bytes(tuple(shapes(config, parts).items()))


@lru_cache(maxsize=256)
def _blob_bytes(shapes: tuple[tuple[str, Shape], ...]) -> int:
    return len(tensors.encode({name: np.zeros(shape, np.float32) for name, shape in shapes}))


def obstacle(config: RunConfig) -> str | None:
    """Why a server would refuse to lead this run: something is too large to travel."""
    parts = {part for stage in range(1, config.stage_count + 1) for part in config.plan(stage).present}
    try:
        run_chunk_bytes(config, {part: part_shapes(config, part) for part in in_model_order(parts)}, packet_limit=None)
    except ConfigError as error:
        return str(error)
    return None


def stage_traffic(config: RunConfig) -> list[Traffic]:
    """Of every stage of the run."""
    packets, rules = Packets(config), Rules.of(config)
    found: list[Traffic] = []
    lacking, moved = frozenset({CONFIG}), frozenset[str]()  # never fetched; changed since they were
    graphs = frozenset[str]()
    steps = Counter[str]()  # part -> patches that lead to it
    for stage, rounds in enumerate(config.round_counts, 1):
        plan = config.plan(stage)
        before, graphs = graphs, frozenset(packets.graphs(plan))
        lacking, moved = lacking | frozenset(plan.added) | (graphs - before), moved & frozenset(plan.present)
        down, up = packets.once_a_stage(plan), 0
        for round in range(1, rounds + 1):
            calibrated = rules.calibrates(State(stage=stage, round=round))
            down += packets.announced(plan, calibrated, steps)
            for one in (packets.fetching(lacking, moved), packets.training(plan)):
                down, up = down + one[0], up + one[1]
            lacking, moved = frozenset(), frozenset((*plan.uploaded, *(plan.calibrated if calibrated else ())))
            steps.update(moved if config.transfer.codec != "fp32" else ())
        joining, _ = packets.fetching(frozenset((CONFIG, *plan.present, *graphs)), frozenset())
        found.append(Traffic(down, up, joining))
    return found


class Packets:
    """Sizes of the packets of a run, each as (down, up) where not stated otherwise."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._topics = config, Topics(config.run.fleet)
        self._run = new_id(config.run.name)
        self._sizes: dict[frozenset[str], int] = {frozenset({CONFIG}): len(config.to_bytes())}
        self._sizes |= {frozenset({engine}): GRAPHS[engine] for engine in config.graphs}
        self.fetching = lru_cache(self._fetching)
        self.training = lru_cache(self._training)
        self._announced = lru_cache(self._announcement)
        self._change = lru_cache(self._change_bytes)

    def _fetching(self, whole: frozenset[str], moved: frozenset[str]) -> tuple[int, int]:
        """Manifests and chunks of parts, a blob each, `moved` ones once they are held; the two questions for them, and that they came."""
        sizes = [*(self._size(frozenset({part})) for part in whole), *(self._change(frozenset({part})) for part in moved)]
        manifests = [self._manifest(size) for size in sizes]
        down = sum(self._told(one) + self._chunks(one, partial(self._topics.blob_chunk, DIGEST)) for one in manifests)
        for_manifests = m.Need(blobs=tuple(m.Want(id=DIGEST, missing=None) for _ in manifests))
        for_chunks = m.Need(blobs=tuple(m.Want(id=DIGEST, missing=_all(one)) for one in manifests))
        got = m.Got(chunks=sum(len(one.digests) for one in manifests))
        return down, sum(self._says(one) for one in (for_manifests, for_chunks, got))

    def _training(self, plan: StagePlan) -> tuple[int, int]:
        """A round without its downloads: the task, and the update on its way."""
        manifest = self._manifest(self._change(frozenset(plan.uploaded)))
        place = {"run": self._run, "stage": plan.stage, "round": self._config.round_counts[plan.stage - 1]}
        task = m.Task(**place, participant=0)
        grant = m.Grant(contribution=CONTRIBUTION, worker=WORKER, missing=_all(manifest), window=self._config.transfer.window)
        down = sum(self._told(one) for one in (task, grant, m.Done(contribution=CONTRIBUTION)))
        beat = m.Beat(**place, epoch=1, epochs=self._config.train.epochs, step=1, steps=100, loss=LOSS, rss_mb=REAL)
        said = report.Report(
            images=10_000, skipped=0, steps=100, losses=(LOSS,) * self._config.train.epochs, seconds=REAL, memory=MEMORY, execution=MACHINE
        )
        offer = m.Offer(contribution=CONTRIBUTION, **place, participant=0, manifest=manifest, report=said)
        fin = m.Fin(contribution=CONTRIBUTION, traffic=report.Traffic(down=COUNT, up=COUNT))
        states = [m.State(state="training", start=START), m.State(state="ready", start=START)]
        up = self._chunks(manifest, partial(self._topics.update_chunk, DEVICE, WORKER, CONTRIBUTION))
        return down, up + sum(self._says(one) for one in (*states, beat, offer, fin))

    def graphs(self, plan: StagePlan) -> tuple[GraphEngine, ...]:
        """Those that devices need in a stage."""
        return self._config.graphs if plan.frozen_layers else ()

    def announced(self, plan: StagePlan, calibrated: bool, steps: Mapping[str, int]) -> int:
        """Announcements of a round, down; `steps`: how often each part has changed so that a patch tells of it."""
        phases: tuple[m.Phase, ...] = ("aggregating", "calibrating") if calibrated else ("aggregating",)
        kept = frozenset((part, min(count, KEPT_PATCHES)) for part, count in steps.items() if part in plan.present)
        return self._announced(plan, "training", kept) + sum(self._announced(plan, phase) for phase in phases)

    def once_a_stage(self, plan: StagePlan) -> int:
        """Announcements of its end, down."""
        last = self._announced(plan, "finished" if plan.stage == self._config.stage_count else "preparing")
        return last + (self._announced(plan, "evaluating") if Rules.of(self._config).judge else 0)

    def _announcement(self, plan: StagePlan, phase: m.Phase, kept: frozenset[tuple[str, int]] = frozenset()) -> int:
        """`kept`: how many patches lead to a part."""
        rounds, stages = self._config.round_counts[plan.stage - 1], self._config.stage_count
        blobs = {part: _blob(self._size(frozenset({part}))) for part in (CONFIG, *plan.present)}
        where = {"phase": phase, "stage": plan.stage, "stages": stages, "round": rounds, "rounds": rounds}
        patches = {part: (self._patch(part),) * count for part, count in kept}
        place = {"run": self._run, "epoch": 1, "seq": 100}
        graphs = {engine: _blob(GRAPHS[engine]) for engine in self.graphs(plan)} if phase == "training" else {}
        run = m.Run(**place, **where, config=blobs.pop(CONFIG), parts=blobs, patches=patches, graphs=graphs)
        return publish_bytes(self._topics.run, m.encode(run), version5=True)

    def _patch(self, part: str) -> m.Patch:
        return m.Patch(base=DIGEST, blob=_blob(self._change(frozenset({part}))))

    def _change_bytes(self, parts: frozenset[str]) -> int:
        """What brings `parts` from one round to the next, or an update of them: in fp32 themselves."""
        codec = self._config.transfer.codec
        return self._size(parts) if codec == "fp32" else packed_bytes(shapes(self._config, parts), codec)

    def _size(self, parts: frozenset[str]) -> int:
        if parts not in self._sizes:
            self._sizes[parts] = bytes_of(self._config, parts)
        return self._sizes[parts]

    def _manifest(self, size: int) -> m.Manifest:
        chunk = self._config.transfer.chunk_bytes
        return m.Manifest.model_construct(blob=_blob(size), chunk_bytes=chunk, digests=(DIGEST,) * -(-size // chunk))

    def _chunks(self, manifest: m.Manifest, topic: Callable[[int], str]) -> int:
        size, step = manifest.blob.size, manifest.chunk_bytes
        starts = enumerate(range(0, size, step))
        return sum(publish_bytes(topic(index), bytes(min(step, size - start)), version5=True) for index, start in starts)

    def _told(self, message: m.Message) -> int:
        return publish_bytes(self._topics.to_device(DEVICE, m.KINDS[type(message)]), m.encode(message), version5=True)

    def _says(self, message: m.Message) -> int:
        return publish_bytes(self._topics.from_device(DEVICE, m.KINDS[type(message)]), m.encode(message), version5=True)


def _blob(size: int) -> m.BlobRef:
    """Also of a size that may not travel."""
    return m.BlobRef.model_construct(id=DIGEST, size=size)


def _all(manifest: m.Manifest) -> str:
    return ranges(list(range(len(manifest.digests))))
