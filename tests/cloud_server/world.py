"""A whole fleet in one thread and in virtual time: the real server over the memory broker."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lwfed.child import Said
from lwfed.cloud_server import merge as merging
from lwfed.cloud_server.course import Course
from lwfed.cloud_server.limits import Door
from lwfed.cloud_server.news import News
from lwfed.cloud_server.server import Server
from lwfed.cloud_server.torch_jobs import foreseen
from lwfed.config import RunConfig
from lwfed.console import Console
from lwfed.models.shapes import part_shapes
from lwfed.transport.memory import MemoryBroker
from lwfed.wire import messages, tensors
from lwfed.wire.topics import Topics

from .devices import FakeDevice, drawn


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
