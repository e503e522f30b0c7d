"""A whole fleet in one thread and in virtual time: the real server over the memory broker, the transfer machines of real
devices, and numpy in place of torch."""

import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import numpy as np
import pytest

from lwfed.blobs import BlobStore
from lwfed.child import Said
from lwfed.cloud_server import merge as merging
from lwfed.cloud_server.course import Course
from lwfed.cloud_server.limits import Door
from lwfed.cloud_server.news import News
from lwfed.cloud_server.server import Server
from lwfed.cloud_server.store import open_store
from lwfed.cloud_server.torch_jobs import foreseen
from lwfed.config import RunConfig, load_config
from lwfed.console import Console
from lwfed.models.shapes import part_shapes, shapes
from lwfed.plan import VARIANCE
from lwfed.seeds import derive
from lwfed.transport.base import Connected, Received, Will
from lwfed.transport.memory import MemoryBroker
from lwfed.wire import deltas, messages, tensors
from lwfed.wire.download import Downloads
from lwfed.wire.messages import Execution, Memory, Offer, Report, Traffic, encode
from lwfed.wire.signed import unverified
from lwfed.wire.sizes import stated_shapes
from lwfed.wire.topics import ToDevice, Topics
from lwfed.wire.upload import Upload, contribution_id

from .merging import merge_parts, settings_of
from .postgres import Postgres, find

PROCESSES = itertools.count(1)  # of agents
TINY = [
    "model.image_size=8", "model.width=8", "model.depth=2", "model.heads=2", "ssl.hidden_dim=8", "ssl.output_dim=4",
    "stages.rounds_per_stage=2", "rounds.min_devices=2", "rounds.deadline_s=100", "transfer.chunk_bytes=1024",
    "calibration.every=round", "evaluation.data=digits",
]  # fmt: skip


@pytest.fixture
def tiny():
    return lambda *settings: load_config("demo", [*TINY, *settings])


def drawn(shape, *labels):
    """Random tensors that depend on nothing but the labels, of which the last may be a tensor's name."""
    stream = derive(0, "test", *labels)
    found = np.random.RandomState([stream & 0xFFFFFFFF, stream >> 32]).normal(size=shape).astype(np.float32)
    return np.abs(found) if str(labels[-1]).endswith(VARIANCE) else found


@pytest.fixture(scope="session")
def postgres():
    if find("postgres") is None:
        pytest.skip("PostgreSQL is not installed")
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request):
    """The address of an empty one, as `--database` takes it."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgres").address()


@pytest.fixture
def opened(tmp_path):
    """Opens a store of a folder of its own."""
    stores = []

    def opened(address, run="demo", folder="state"):
        (tmp_path / folder).mkdir(exist_ok=True)
        stores.append(open_store(tmp_path / folder, run, address, lambda: 1000.0, durable=False))
        return stores[-1]

    yield opened
    for one in stores:
        one.close()


@pytest.fixture
def address(postgres):
    return postgres.address()


@pytest.fixture
def make_report():
    return report


def report(images=10, loss=1.0, peak_mb=300.0):
    memory = Memory(baseline_mb=200, peak_mb=peak_mb, peak_source="VmHWM", curve=())
    execution = Execution(prefix="torch", micro_batch=16, precision="fp32", threads=1, torch="2", machine="x86_64")
    return Report(images=images, skipped=0, steps=3, losses=(loss,), seconds=1, memory=memory, execution=execution)


class NumpyWorker:
    """Does the jobs of the worker at once, those of torch with numpy; results depend on their inputs alone."""

    def __init__(self, deliver, world):
        self._deliver, self._world = deliver, world

    def send(self, job):
        self._world.orders.append(job)
        with open(job["config"], "rb") as file:
            config = RunConfig.from_bytes(file.read())
        jobs = {"aggregate": self._aggregate, "prepare": self._prepare, "calibrate": self._calibrate, "evaluate": self._evaluate}
        self._deliver(Said(self, json.loads(json.dumps(jobs[job["do"]](config, job)))))

    def _aggregate(self, config, job):
        return {"event": "aggregated", **asdict(merging.merge(config, json.loads(json.dumps(job))))}

    def _write(self, job, part, found):
        path = f"{job['out']}/{part}"
        with open(path, "wb") as file:
            file.write(tensors.encode(found))
        return path

    def _prepare(self, config, job):
        new = {
            part: {name: drawn(shape, "init", job["attempt"], name) for name, shape in part_shapes(config, part).items()}
            for part in config.plan(job["stage"]).added
        }
        files = {part: self._write(job, part, found) for part, found in new.items()}
        found = {"event": "prepared", "parts": files, "shapes": foreseen(config)}
        if self._world.no_graphs:
            return {**found, "graphs": {}, "no_graphs": self._world.no_graphs}
        graphs = {engine: f"{job['out']}/{engine}.onnx" for engine in job["graphs"]}
        for engine, file in graphs.items():
            Path(file).write_bytes(f"graph of {engine}".encode())
        return {**found, "graphs": graphs, "no_graphs": None}

    def _calibrate(self, config, job):
        files = {}
        for part in config.plan(job["stage"]).calibrated:
            with open(job["parts"][part], "rb") as file:
                held = tensors.decode(file.read(), part_shapes(config, part))
            files[part] = self._write(
                job, part, {name: value + np.float32(job["round"] * job["lr_scale"]) / 8 for name, value in held.items()}
            )
        return {"event": "calibrated", "parts": files, "loss": 0.5, "seconds": 0.1}

    def _evaluate(self, config, job):
        state, collapses = self._world.course.state, self._world.collapses
        collapsed = None if collapses is None else (state.stage, state.attempt) in collapses
        names = ("accuracy", "class_accuracy", "precision", "recall", "f1")
        scores = {name: {"knn": dict.fromkeys(names, 0.5), "probe": dict.fromkeys(names, 0.25)} for name in job["names"]}
        variety = None if collapsed is None or "trained" not in job["names"] else {"spread": 0.9, "rank": 5.0, "collapsed": collapsed}
        return {"event": "evaluated", "scores": scores, "variety": variety}

    def kill(self):
        pass

    def close(self):
        pass


class FakeDevice:
    """What a device does on the wire; its training is a function of the model, the participant, the stage and the round."""

    def __init__(
        self,
        broker,
        root,
        name,
        *,
        images=10,
        fails=0,
        code="memory",
        spoil=lambda update: update,
        loss=lambda stage, round: 1.0,
        takes=lambda stage, round: 0.0,  # seconds
        boot=1,
    ):
        self.name, self.images, self.fails, self.code, self.spoil, self.loss = name, images, fails, code, spoil, loss
        self.takes = takes
        self.broker, self.topics = broker, Topics("default")
        self.held, self.spool = BlobStore(root / name / "held", durable=False), BlobStore(root / name / "spool", durable=False)
        self.transport = broker.transport()
        self.boot = boot - 1
        self.tasks, self.refusals, self.sent = [], [], 0
        self.failed = Counter()  # (stage, round) -> attempts that failed
        self.seen = (0, 0)  # journalled: it survives restarts
        self.begin()
        self.open()

    def begin(self):
        self.boot += 1
        self.start = messages.Start(boot=self.boot, nonce=f"{next(PROCESSES):016x}")

    def open(self):
        self.downloads = Downloads(self.topics, self.name, self.held, seed=1)
        self.upload = self.task = self.run = self.done_task = None
        self.online = self.ready_at = None
        for filter in self.topics.for_device(self.name):
            self.transport.subscribe(filter)
        self.transport.open(self.name, Will(self.topics.from_device(self.name, "state"), encode(self.state("lost"))), self.handle)

    def restart(self):
        """As its service does: it says goodbye and begins anew, with what it has on disk."""
        self.tell("state", self.state("stopped"), retain=True)
        self.transport.close()
        self.begin()
        self.connect()

    def connect(self):
        """Anew, which throws out another one of its identity."""
        self.transport = self.broker.transport()
        self.open()

    def state(self, state):
        return messages.State(state=state, start=self.start)

    def tell(self, kind, message, retain=False):
        self.transport.publish(self.topics.from_device(self.name, kind), encode(message), retain=retain)

    def handle(self, event):
        match event:
            case Connected():
                self.online = None
                self.tell("state", self.state("ready"), retain=True)
            case Received(topic, payload):
                parsed = self.topics.parse(topic)
                if topic == self.topics.server_state:
                    self.on_server(messages.decode_server_state(payload))
                elif topic == self.topics.run:
                    self.on_run(messages.decode(messages.Run, unverified(payload)))
                elif isinstance(parsed, ToDevice):
                    self.on_order(messages.decode(messages.DOWN[parsed.kind], payload))
                else:
                    self.downloads.on_chunk(parsed.blob, parsed.index, payload)

    def on_server(self, state):
        if state != self.online and state.online:
            self.greet()
            self.downloads.reset()
            if self.upload:
                self.upload.reset()
        self.online = state

    def greet(self, rival=None):
        hello = messages.Hello(
            start=self.start, rival=rival, lwfed="0", python="3", torch="2", machine="x86_64", cores=1, memory_mb=100,
            images=self.images, source="folder",
        )  # fmt: skip
        self.tell("hello", hello)

    def on_run(self, run):
        if (run.epoch, run.seq) >= self.seen:
            self.seen, self.run = (run.epoch, run.seq), run
            if self.task and self.over(self.task, run):
                self.task = self.ready_at = None

    def over(self, task, run):
        there = (run.stage, run.round) == (task.stage, task.round)
        withdrawn = run.phase not in ("preparing", "waiting", "training") or (run.paused and run.phase == "waiting")
        return withdrawn if there else (run.stage, run.round) > (task.stage, task.round)

    def on_order(self, message):
        match message:
            case messages.Task():
                if message not in (self.task, self.done_task):
                    self.tasks.append((message.stage, message.round))
                    self.task, self.upload, self.ready_at = message, None, None
                else:
                    self.tell("state", self.state("training" if self.task else "ready"), retain=True)
            case messages.Manifest():
                self.downloads.on_manifest(message)
            case messages.Challenge(rival=rival):
                if rival != self.start.nonce:
                    self.greet(rival)
            case _ if self.upload:
                handlers = {"Grant": self.upload.on_grant, "Wait": self.upload.on_wait, "Miss": self.upload.on_miss,
                            "Done": self.upload.on_done, "Refuse": self.upload.on_refuse}  # fmt: skip
                handlers[type(message).__name__](message)
                if isinstance(message, messages.Refuse):
                    self.refusals.append(message.code)
                    self.done_task = None if message.code == "stale" else self.done_task
            case messages.Refuse():
                self.refusals.append(message.code)

    def poll(self, now):
        if self.online is None or not self.online.online:
            return
        if self.task and self.run and (self.run.stage, self.run.round, self.run.phase) == (self.task.stage, self.task.round, "training"):
            self.downloads.want([self.run.config, *self.run.parts.values(), *self.run.graphs.values()])
            if self.downloads.complete:
                if self.ready_at is None:
                    self.ready_at = now + self.takes(self.task.stage, self.task.round)
                if now >= self.ready_at:
                    self.train()
        commands = self.downloads.poll(now)
        if self.upload:
            commands += self.upload.poll(now, self.upload.window - self.transport.pending, Traffic(down=self.sent * 100, up=self.sent * 10))
        for command in commands:
            self.transport.execute(command)

    def train(self):
        config = RunConfig.from_bytes(self.held.read(self.run.config.id))
        task, plan = self.task, config.plan(self.task.stage)
        self.ready_at = None
        if self.fails:
            self.fails, self.task = self.fails - 1, None
            self.failed[task.stage, task.round] += 1
            place = {"run": task.run, "stage": task.stage, "round": task.round}
            attempt = self.failed[task.stage, task.round]
            self.tell("fail", messages.Fail(**place, code=self.code, reason=f"out of {self.code}", attempt=attempt))
            return
        current = {}
        for part in plan.present:
            current |= tensors.decode(self.held.path(self.run.parts[part].id), part_shapes(config, part))
        update = {
            name: current[name] + drawn(shape, task.participant, task.stage, task.round, name) * np.float32(self.run.lr_scale)
            for name, shape in shapes(config, plan.uploaded).items()
        }
        blob = self.spool.put(self.encode(config, task, self.spoil(update), current))
        offer = Offer(
            contribution=contribution_id(task.run, task.stage, task.round, self.name, blob.id), run=task.run, stage=task.stage,
            round=task.round, participant=task.participant, manifest=self.spool.manifest(blob.id, config.transfer.chunk_bytes),
            report=report(images=self.images * (task.participant + 1), loss=self.loss(task.stage, task.round)),
        )  # fmt: skip
        self.task, self.done_task = None, task
        self.sent += 1
        self.upload = Upload(self.topics, self.name, offer, self.spool, seed=task.participant)

    def encode(self, config, task, update, received):
        if config.transfer.codec == "fp32":
            return tensors.encode(update)
        seed = derive(config.run.seed, "codec", task.stage, task.round, task.participant)
        return deltas.encode({name: update[name] - received[name] for name in update}, config.transfer.codec, 1.0, seed)[0]

    def next_wakeup(self, now):
        if self.online is None or not self.online.online:
            return None
        times = [self.ready_at, self.downloads.next_wakeup(now), self.upload.next_wakeup(now) if self.upload else None]
        return min((time for time in times if time is not None), default=None)


@dataclass
class World:
    """`settle` lets everything happen that follows by itself, letting time pass where something waits for it."""

    root: object
    config: RunConfig
    broker: MemoryBroker
    devices: list = field(default_factory=list)
    orders: list = field(default_factory=list)  # to the torch process
    no_graphs: str | None = None  # why the torch process makes none
    collapses: set | None = None  # (stage, attempt); None: that cannot be judged
    now: float = 0.0
    server: Server | None = None
    course: Course | None = None
    state: str = "server"  # folder of the run
    database: str | None = None
    durable: bool = False

    @property
    def jobs(self):
        return [order["do"] for order in self.orders]

    @property
    def announced(self):
        """What was said to all devices of the run, in order."""
        return [messages.decode(messages.Run, payload) for _, topic, payload in self.broker.log if topic.endswith("all/run")]

    def start(self, **options):
        self.course = Course(self.config, self.root / self.state, lambda: 1e9 + self.now, self.durable, self.database)
        news = News(Console(as_json=True), self.config, "mqtt://127.0.0.1:1883")
        self.server = Server(
            self.course,
            self.broker.transport(),
            news,
            lambda deliver: NumpyWorker(deliver, self),
            door=Door(Topics("default"), lambda: self.now),
            clock=lambda: self.now,
            **options,
        )
        self.server.begin()

    def kill(self):
        """As SIGKILL does: nothing is said and nothing is saved."""
        self.broker.cut("lwfed-default-server", reconnect=False)
        self.course.store.close()
        self.broker.restore("lwfed-default-server")
        self.server = None

    def join(self, name, **options):
        device = self.bring(name, **options)
        self.settle(until=lambda: True)
        return device

    def bring(self, name, **options):
        """A device that has said nothing yet."""
        self.devices.append(FakeDevice(self.broker, self.root, name, **options))
        return self.devices[-1]

    def step(self):
        """The least that can happen: a message is delivered, or the server handles one thing that was."""
        for device in self.devices:
            device.poll(self.now)
        if not self.server._queue.empty():
            self.server.handle(self.server._queue.get())
        elif self.broker.pump(1) == 0:
            self.pass_time()
            self.server.handle(None)

    def quiet(self):
        """Everything that needs no time to pass."""
        while True:
            count = self.broker.pump() + (self.server.drain() if self.server else 0)
            for device in self.devices:
                device.poll(self.now)
            if self.server:
                self.server.handle(None)
            if count == 0 and self.broker.pump() == 0:
                return

    def settle(self, until, limit=400):
        for _ in range(limit):
            self.quiet()
            if until():
                return
            self.pass_time()
        raise AssertionError(f"no end in sight: {self.course.state}")

    def pass_time(self):
        parties = [*self.devices, *([self.server] if self.server else [])]
        times = [time for party in parties if (time := party.next_wakeup(self.now)) is not None]
        assert times, f"nothing will ever happen: {self.course.state}"
        self.now = max(self.now + 1e-3, min(times))

    def finish(self):
        self.settle(until=lambda: self.course.state.over)
        self.quiet()
        return self.course.encoder_path.read_bytes()


@pytest.fixture
def said(monkeypatch):
    """What the server says, as events."""
    events = []
    monkeypatch.setattr(click, "echo", lambda line: events.append(json.loads(line)))
    return events


@pytest.fixture
def world(tmp_path, tiny, said):
    worlds = []
    numbers = itertools.count()

    def world(*settings, faults=None):
        root = tmp_path / f"world-{next(numbers)}"
        (root / "server").mkdir(parents=True)
        worlds.append(World(root, tiny(*settings), MemoryBroker(faults)))
        return worlds[-1]

    yield world
    for one in worlds:
        if one.course:
            one.course.store.close()


@pytest.fixture
def write(tmp_path):
    """A file of tensors, as a device's update is one."""

    def write(name, **values):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(tensors.encode({name: np.asarray(value, np.float32) for name, value in values.items()}))
        return path

    return write


@pytest.fixture
def merge(write):
    """The tensor w of some shares, where devices had received `before`, ones where it is not stated."""

    def merge(rule, shares, before=None, **settings):
        shape = stated_shapes(shares[0].path)["w"] if shares else ()
        received = {"stem": write("before", w=np.ones(shape) if before is None else before)}
        return merge_parts(settings_of(rule, **settings), received, shares)["stem"]["w"]

    return merge
