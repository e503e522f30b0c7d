"""The life of a device's task, from its assignment until there is an update to hand over.

    idle --task--> called --its announcement--> fetching --all blobs held, and no older update in hand--> starting
    starting --worker ready--> training                starting, training --worker killed, patches that made no part--> called
    training --update written--> idle                  any --newer round, failure--> idle

A task and its announcement travel on different topics and come in any order. Until its round is announced a task is kept
aside and nothing is given up for it: it may be stray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lwfed.blobs import BlobStore, Holdings
from lwfed.config import RunConfig
from lwfed.console import counted
from lwfed.data import Source
from lwfed.edge_agent import events
from lwfed.edge_agent.events import Effect, EndWorker, Show, StartWorker, Tell, Train
from lwfed.edge_agent.executions import Executions
from lwfed.edge_agent.handover import Handover, Link, megabytes, where
from lwfed.edge_agent.job import Job, WorkerFor
from lwfed.edge_agent.journal import Journal
from lwfed.edge_agent.ways import Pathfinder, Way, needed
from lwfed.errors import ConfigError, InvalidPayload
from lwfed.seeds import derive
from lwfed.wire.commands import Send
from lwfed.wire.download import Downloads
from lwfed.wire.messages import Beat, Fail, FailCode, Run, Task, encode
from lwfed.wire.report import Report, Traffic
from lwfed.wire.sizes import largest_bytes
from lwfed.wire.topics import Topics

BEAT_S = 10.0
MAX_KILLED = 3  # training processes of one task after which it begins again, as it was
FAIL_CODES: Mapping[str, FailCode] = {
    "DataError": "data",
    "MissingDependency": "data",
    "OutOfMemory": "memory",
    "out of memory": "memory",
    "killed": "memory",  # again and again: programs that act before memory runs out leave no other trace
    "Unfit": "unfit",
    "Diverged": "diverged",
    "ConfigError": "config",
}
Phase = Literal["idle", "called", "fetching", "starting", "training"]


@dataclass(frozen=True)
class Places:
    data: str  # the source of images, as the person named it
    kept: Path  # decoded images
    out: Path  # where the worker writes its update
    budget_mb: float | None = None  # memory for all processes of the agent; None: a share of what is there
    shared: bool = False  # several devices of a simulation share a folder of images


class Work:
    def __init__(self, device: str, topics: Topics, journal: Journal, held: Holdings, spool: BlobStore, places: Places, link: Link) -> None:
        self.downloads = Downloads(topics, device, held, seed=derive(0, "download", device))
        self.handover = Handover(device, topics, journal, spool, link)
        self._device, self._topics, self._journal, self._held, self._places = device, topics, journal, held, places
        self._phase: Phase = "idle"
        self._task: Task | None = None
        self._early: Task | None = None  # of a round that is not announced
        self._run: Run | None = None
        self._job: Job | None = None  # while starting and training
        self._worker: WorkerFor | None = None
        self._ready: events.WorkerReady | None = None  # said by the worker, once it may be given work
        self._linger_until: float | None = None
        self._next_beat = float("-inf")
        self._losses: list[float] = []  # of the present epoch
        self._over = False  # the present task has taken more than its budget
        self._killed = 0  # training processes that somebody ended in the present task
        self._to_fetch = 0
        self._few_said_in: str | None = None  # run
        self._executions, self._pathfinder = Executions(journal), Pathfinder(held)
        self._ways: dict[str, Way] = {}  # to the parts of the present round
        self._distrusts_graphs = False  # a training process that had some has crashed

    @property
    def busy(self) -> bool:
        return self._phase != "idle" or self.handover.update is not None

    def recall(self) -> list[Effect]:
        """After a start: what the journal says was going on."""
        effects = self.handover.recall()
        if (task := self._journal.task) is not None:
            self._journal.abandon()
            effects.append(Tell("warning", f"{where(task)} was interrupted; it begins again when the server asks"))
        return effects

    def announce(self, run: Run) -> list[Effect]:
        """Where the run stands now."""
        self._run = run
        self._journal.lose(*_place(run))
        effects: list[Effect] = []
        if self._task is not None and (self._task.run != run.run or _is_over(self._task, run)):
            withdrawn = run.paused and _place(self._task) == _place(run)
            how = "is withdrawn until the run goes on" if withdrawn else "went on without this device"
            effects.append(Tell("warning", f"{where(self._task)} {how}"))
            effects += self._give_up()
        if self._phase == "fetching":
            self._phase = "called"  # the announcement may name other blobs
        if self._worker is not None and ((run.run, run.stage) != (self._worker.run, self._worker.stage) or run.over):
            effects += self._end_worker()
        if self._early is not None and _place(self._early) == _place(run):
            early, self._early = self._early, None
            effects += self.assign(early)
        return effects

    def assign(self, task: Task) -> list[Effect]:
        """The server wants this device to train; it says so again whenever it is unsure."""
        run = self._run
        if (run is not None and task.run == run.run and _is_over(task, run)) or task == self._task:
            return []
        if self.handover.covers(task):
            return []
        if run is None or _place(task) != _place(run):
            known, self._early = self._early, task
            return [_set_aside(task, run)] if run is not None and known is None else []
        effects = self._give_up()
        self.handover.ask()
        self._task, self._phase, self._killed = task, "called", 0
        self._journal.begin(task)
        said = {"run": task.run, "stage": task.stage, "round": task.round, "participant": task.participant}
        return [*effects, Tell("task", f"{where(task)}: this device trains", said)]

    def is_on(self, task: Task) -> bool:
        """It has what it takes to work on it, or hands its update over."""
        return (task == self._task and self._phase != "called") or self.handover.covers(task)

    def resume(self, epoch: int) -> list[Effect]:
        """Connection or server are back; the server is in its start number `epoch`."""
        self.downloads.reset()
        return self.handover.reset(epoch)

    def poll(self, now: float, online: bool, traffic: Traffic) -> list[Effect]:
        effects = self._advance()
        if online:
            effects += self.downloads.poll(now)
            effects += self.handover.poll(now, traffic)
        if self._worker is not None and self._linger_until is not None and now >= self._linger_until:
            effects += self._end_worker()
        return effects

    def next_wakeup(self, now: float, online: bool) -> float | None:
        times = [self._linger_until]
        if online:
            times += [self.downloads.next_wakeup(now), self.handover.next_wakeup(now)]
        return min((time for time in times if time is not None), default=None)

    def on_worker(self, event: events.WorkerEvent, now: float) -> list[Effect]:
        match event:
            case events.WorkerReady():
                self._ready = event
                if self._job is None:
                    return []
                return self._again_if_lost(self._job.run, self._job.ways) or self._train(self._job, event)
            case events.WorkerLoading(what, done, total):
                return [Show(what, done, total)]
            case events.WorkerPatched(files):
                for file in files:
                    self._held.adopt(file)
                return []
            case events.WorkerWarning(text):
                return [Tell("warning", text)]
            case events.WorkerPlanned():
                return self._fix_execution(event)
            case events.WorkerRecomputes(why):
                return [Tell("recomputes", why)]
            case events.WorkerProgress():
                return self._progress(event, now)
            case events.WorkerOver():
                return self._note_over(event)
            case events.WorkerDone():
                return self._finish(event, now)
            case events.WorkerError("InvalidPayload", message) if self._job is not None and self._pathfinder.doubt(self._job.ways):
                self._job, self._phase = None, "called"
                return [*self._end_worker(), Tell("warning", f"{message}; the whole parts are fetched instead")]
            case events.WorkerError("killed") if self._job is not None and self._killed < MAX_KILLED:
                return self._begin_again(self._job.task, event)
            case events.WorkerError("killed", message) if self._job is not None:
                both = "memory is probably short, unless somebody ends them all"
                return self._fail(self._job.task, replace(event, message=f"{message}. It is the {MAX_KILLED + 1}th in this task: {both}"))
            case events.WorkerError():
                return self._fail(self._job.task, event) if self._job is not None else self._end_worker(event.ended)

    # Towards training

    def _advance(self) -> list[Effect]:
        task, run = self._task, self._run
        if task is None or run is None:
            return []
        if self._phase == "called" and _is_on(task, run):
            self._ways = self._pathfinder.ways(run)
            wanted = [run.config, *run.graphs.values(), *(blob for way in self._ways.values() for blob in way.fetched)]
            self._held.forget(set(needed(run, self._ways)))
            self.downloads.want(wanted)
            have, total = self.downloads.progress()
            self._to_fetch, self._phase = total - have, "fetching"
        if self._phase == "fetching" and self.downloads.complete and self.handover.update is None:
            return [*self._say_download(), *(self._again_if_lost(run, self._ways) or self._prepare(task, run))]
        return []

    def _again_if_lost(self, run: Run, ways: Mapping[str, Way]) -> list[Effect]:
        """The disk may lose a file while others are on their way, an older update is handed over, or torch is imported."""
        if all(map(self._held.has, needed(run, ways))):
            return []
        self._job, self._phase = None, "called"
        return [Tell("warning", "a file of the model is gone or damaged; it is fetched again"), *self._advance()]

    def _say_download(self) -> list[Effect]:
        if not self._to_fetch:
            return []
        bad = self.downloads.bad_chunks
        again = f"; {counted(bad, 'damaged chunk')} had to be sent again" if bad else ""
        text = f"received {megabytes(self._to_fetch)} of the model{again}"
        return [Tell("download", text, {"bytes": self._to_fetch, "bad_chunks": bad})]

    def _prepare(self, task: Task, run: Run) -> list[Effect]:
        try:
            config = RunConfig.from_bytes(self._held.read(run.config.id))
            uploaded = config.plan(task.stage).uploaded
        except (ConfigError, ValueError) as error:
            return self._fail(task, events.WorkerError("ConfigError", str(error)))
        try:
            known = [self._ways[part] for part in uploaded if part in self._ways]  # the worker refuses others
            size = largest_bytes(self._pathfinder.shapes(known), config.transfer.codec)
            self.handover.fitting(size, config.transfer.chunk_bytes, config.train.epochs)
        except (ConfigError, InvalidPayload) as error:
            return self._fail(task, events.WorkerError(type(error).__name__, str(error)))
        job = Job(task, run, config, self._ways)
        self._job, self._phase = job, "starting"
        if self._worker == job.worker:
            return self._train(job, self._ready) if self._ready else []
        effects = self._end_worker()
        self._worker = job.worker
        return [*effects, StartWorker(job.worker.threads)]

    def _train(self, job: Job, ready: events.WorkerReady) -> list[Effect]:
        graphs = {} if self._distrusts_graphs else job.run.graphs
        order = {
            "do": "train",
            "config": str(self._held.path(job.run.config.id)),
            "parts": {part: self._pathfinder.source(way) for part, way in job.ways.items()},
            "graphs": {engine: str(self._held.path(ref.id)) for engine, ref in graphs.items()},
            "stage": job.task.stage,
            "round": job.task.round,
            "participant": job.task.participant,
            "after": self._journal.after(job.task),
            "lr_scale": job.run.lr_scale,
            "data": self._places.data,
            "shared": self._places.shared,
            "kept": str(self._places.kept),
            "out": str(self._places.out),
            "execution": self._executions.fixed(job.task, job.config, ready),
            "budget_mb": self._places.budget_mb,
        }
        self._phase, self._linger_until, self._next_beat, self._losses = "training", None, float("-inf"), []
        return [Train(order, job.config.worker.sample_s)]

    def _fix_execution(self, event: events.WorkerPlanned) -> list[Effect]:
        if self._job is None or self._ready is None:
            return []
        self._over = False
        return self._executions.fix(self._job.task, self._job.config, self._ready, event)

    # From training on

    def _progress(self, event: events.WorkerProgress, now: float) -> list[Effect]:
        if self._job is None:
            return []
        task = self._job.task
        self._losses.append(event.loss)
        place = {"stage": task.stage, "round": task.round}
        effects: list[Effect] = [Show(f"{where(task)}: training", event.step, event.steps)]
        if event.step % (event.steps // event.epochs) == 0:
            loss, self._losses = sum(self._losses) / len(self._losses), []
            text = f"epoch {event.epoch} of {event.epochs}: loss {loss:.4f}, memory {event.rss_mb:.0f} MB"
            said = {**place, "epoch": event.epoch, "epochs": event.epochs, "loss": loss, "rss_mb": event.rss_mb}
            effects.append(Tell("training", text, said))
        if now >= self._next_beat:
            self._next_beat = now + BEAT_S
            effects.append(self._send("beat", Beat(run=task.run, **place, **vars(event))))
        return effects

    def _note_over(self, event: events.WorkerOver) -> list[Effect]:
        """The round goes on as it is, for its bits depend on how it began."""
        if self._job is None:
            return []
        self._over = True
        beside = f"{event.budget_mb:.0f} MB of --memory-budget are left for it"
        text = f"{where(self._job.task)} takes {event.peak_mb:.0f} MB for training, and {beside}"
        return [Tell("warning", text, {"peak_mb": event.peak_mb, "budget_mb": event.budget_mb})]

    def _finish(self, event: events.WorkerDone, now: float) -> list[Effect]:
        if self._job is None:
            return []
        job = self._job
        execution = self._journal.execution(job.task.run, job.task.stage)
        said = {name: value for name, value in vars(event).items() if name != "file"}
        few = self._say_few(job, event)
        try:
            effects = self.handover.begin(job.task, event.file, Report(**said, execution=execution), job.config.transfer.chunk_bytes)
        except ConfigError as error:
            return self._fail(job.task, events.WorkerError("ConfigError", str(error)))
        self._job, self._task, self._phase = None, None, "idle"
        self._linger_until = now + job.config.worker.linger_s
        if self._over and (least := self._executions.take_least(job.task, job.config, "to keep to --memory-budget")):
            effects += [*least, *self._end_worker()]  # whose memory holds what is not wanted any more
        return few + effects

    def _say_few(self, job: Job, event: events.WorkerDone) -> list[Effect]:
        batch = job.config.train.batch_size
        if event.images >= batch or self._few_said_in == job.task.run:
            return []
        self._few_said_in = job.task.run
        text = f"{event.images} images are fewer than train.batch_size {batch}: this device trains on batches of {event.images}"
        return [Tell("images", text, {"images": event.images, "batch_size": batch})]

    def _begin_again(self, task: Task, event: events.WorkerError) -> list[Effect]:
        """The training process was killed, with memory left: what it was doing gives the same bits in another one."""
        self._killed += 1
        self._job, self._phase = None, "called"
        return [*self._end_worker(ended=True), Tell("warning", f"{event.message}; {where(task)} begins again")]

    def _fail(self, task: Task, event: events.WorkerError) -> list[Effect]:
        """The agent stays; the server may assign the task again, but not where images are the trouble."""
        had_onnx = self._ready is not None and self._ready.onnxruntime is not None
        effects = self._end_worker(event.ended)
        code = FAIL_CODES.get(event.kind, "worker")
        if code == "memory" and self._job is not None:
            why = "since memory is probably short" if event.kind == "killed" else "since memory ran out"
            least = self._executions.take_least(task, self._job.config, why)
            code, effects = ("unfit", effects) if least is None else ("memory", effects + least)
        if event.kind == "crashed" and had_onnx and self._job is not None and self._job.run.graphs and not self._distrusts_graphs:
            self._distrusts_graphs = True
            effects.append(Tell("warning", "ONNX Runtime may be the cause: until this agent is restarted, torch runs frozen layers"))
        self._give_up()
        reason = event.message.replace(self._places.data, Source(self._places.data).label)  # where images lie is nobody's business
        attempt = self._journal.fail(task)
        fail = Fail(run=task.run, stage=task.stage, round=task.round, code=code, reason=reason[:1000], attempt=attempt)
        text = f"{where(task)} failed ({code}): {event.message}"
        if code in ("data", "unfit"):
            text += "; this device stays connected, and is not asked again until it is restarted"
        return [*effects, Tell("warning", text, {"code": code}), self._send("fail", fail)]

    def _give_up(self) -> list[Effect]:
        """Forget the task; a training that is under way, or a start, can only be ended with its process."""
        idle = self._job is None and self._linger_until is not None
        effects = [] if idle else self._end_worker()
        if self._task is not None:
            self._journal.abandon()
            self.downloads.want([])
        self._task, self._job, self._phase = None, None, "idle"
        return effects

    def _end_worker(self, ended: bool = False) -> list[Effect]:
        had, self._worker, self._ready, self._linger_until = self._worker, None, None, None
        return [EndWorker()] if had is not None and not ended else []

    def _send(self, kind: str, message: Beat | Fail) -> Send:
        return Send(self._topics.from_device(self._device, kind), encode(message))


def _set_aside(task: Task, run: Run) -> Tell:
    return Tell("warning", f"set aside a task of run {task.run}, {where(task)}: the server announces run {run.run}, {where(run)}")


def _place(at: Task | Run) -> tuple[str, int, int]:
    return at.run, at.stage, at.round


def _is_on(task: Task, run: Run) -> bool:
    return run.phase == "training" and _place(task) == _place(run)


def _is_over(task: Task, run: Run) -> bool:
    """Whether `run`, of the same name, has left the round of `task`."""
    if (task.stage, task.round) == (run.stage, run.round):
        return run.phase not in ("preparing", "waiting", "training") or (run.paused and run.phase == "waiting")
    return (task.stage, task.round) < (run.stage, run.round)
