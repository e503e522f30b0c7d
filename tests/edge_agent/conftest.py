"""A device's session and the server's half of the transfers, in virtual time over a broker in memory."""

from pathlib import Path

import numpy as np
import pytest

from lwfed.blobs import BlobStore
from lwfed.config import load_config
from lwfed.edge_agent import events
from lwfed.edge_agent.journal import Journal
from lwfed.edge_agent.session import Session
from lwfed.edge_agent.work import Places, Work
from lwfed.transport.base import Received, Will
from lwfed.transport.memory import MemoryBroker
from lwfed.wire import messages, tensors, topics
from lwfed.wire.broadcast import Broadcast
from lwfed.wire.inbox import Inbox
from lwfed.wire.messages import Hello, Run, ServerState, Start, State, Task
from lwfed.wire.report import Memory
from lwfed.wire.topics import Topics

TOPICS = Topics("default")
CONFIG = load_config("demo", ["transfer.chunk_bytes=1024", "worker.linger_s=60"])


def state(world):
    """What the broker retains of the device."""
    return messages.decode(State, world.broker.retained[TOPICS.from_device(world.device.id, "state")])


def part_file(part: str, content: bytes = b"weights" * 1000) -> bytes:
    """As it travels: one tensor, of 25 rows, of the bytes `content`."""
    return tensors.encode({f"{part}.weight": np.frombuffer(content, "<f4").reshape(25, -1)})


class Server:
    """The real transfer machines, without a coordinator: a test says what happens."""

    def __init__(self, broker: MemoryBroker, root: Path, epoch: int = 1, config=CONFIG) -> None:
        self.epoch, self.seq = epoch, 0
        self.greeted: list[str] = []
        self.heard: list[messages.Message] = []
        self.received: list[bytes] = []
        self.known: set[str] = set()
        self.answers = True
        self.done_s = self.refusal = None
        self.store = BlobStore(root / "blobs", durable=False)
        self.broadcast = Broadcast(TOPICS, self.store, config.transfer.chunk_bytes)
        self.inbox = Inbox(TOPICS, BlobStore(root / f"spool{epoch}", durable=False), 10_000_000, self.known.__contains__)
        self.config = self.store.put(config.to_bytes())
        self.link = broker.transport()
        self.queue: list[object] = []
        self.link.subscribe(TOPICS.from_all_devices)
        self.link.open("server", Will(TOPICS.server_state, self.state(online=False)), self.queue.append)
        self.link.publish(TOPICS.server_state, self.state(), retain=True)

    def state(self, online: bool = True) -> bytes:
        return messages.encode(ServerState(online=online, epoch=self.epoch))

    def announce(
        self, phase="training", stage=1, round=1, run="demo", content=b"weights" * 1000, seq=None, parts=None, sealed=bytes, **more
    ):
        self.seq = self.seq + 1 if seq is None else seq
        blobs = {part: self.store.put(part_file(part, content)) for part in ("stem", "layer.1", "norm", "projector", "predictor")}
        place = {"stage": stage, "stages": 4, "round": round, "rounds": 4}
        message = Run(run=run, epoch=self.epoch, seq=self.seq, phase=phase, config=self.config, parts=parts or blobs, **place, **more)
        self.link.publish(TOPICS.run, sealed(messages.encode(message)), retain=True)

    def send(self, device, message):
        self.link.publish(TOPICS.to_device(device, messages.KINDS[type(message)]), messages.encode(message))

    def assign(self, device, stage=1, round=1, run="demo", participant=0):
        self.send(device, Task(run=run, stage=stage, round=round, participant=participant))

    def step(self, now):
        waiting, self.queue[:] = list(self.queue), []
        for event in waiting:
            if isinstance(event, Received) and self.answers:
                self._on(TOPICS.parse(event.topic), event.payload, now)
        if self.answers:
            self._do(self.broadcast.poll(now, 20 - self.link.pending) + self.inbox.poll(now))

    def _on(self, topic, payload, now):
        match topic:
            case topics.UpdateChunk():
                self.inbox.chunk(topic, payload, now)
            case topics.FromDevice(device, kind):
                message = messages.decode(messages.UP[kind], payload)
                self.heard.append(message)
                match message:
                    case Hello():
                        self.greeted.append(device)
                    case messages.Need():
                        self.broadcast.need(device, message, now)
                    case messages.Got():
                        self.broadcast.got(device, message.chunks, now)
                    case messages.Offer():
                        if self.refusal:
                            self._do(self.inbox.refuse(device, message.contribution, self.refusal, "so it is"))
                        else:
                            self._do(self.inbox.offer(device, message, now))
                    case messages.Fin():
                        commands, update = self.inbox.fin(device, message, now)
                        self._do(commands)
                        if update is not None:
                            self.received.append(update.path.read_bytes())
                            self.known.add(update.offer.contribution)
                            self._do(self.inbox.accept(update.offer.contribution))

    def _do(self, commands):
        for command in commands:
            self.link.execute(command)

    def of(self, kind):
        return [message for message in self.heard if isinstance(message, kind)]


class Device:
    """The session with its shell played by the test: worker effects are recorded, their answers injected."""

    def __init__(self, broker: MemoryBroker, root: Path, now: float, wait_s=15, data="digits", believe=None) -> None:
        self.root, self.exit, self.told, self.worker = root, None, [], []
        root.mkdir(exist_ok=True)
        self.journal = Journal(root / "journal.sqlite", device=f"tester-{root.name}")  # fixed, and with it its times to retry
        self.id = self.journal.device
        self.link, self.queue = broker.transport(), []
        self.places = Places(data, root / "images", root / "update.safetensors")
        held, spool = BlobStore(root / "model", durable=False), BlobStore(root / "updates", durable=False)
        work = Work(self.id, TOPICS, self.journal, held, spool, self.places, self.link)
        self.start = Start(boot=self.journal.boot, nonce=f"{self.journal.boot:016x}")
        rest = {"python": "3", "torch": "2", "machine": "m", "cores": 1, "memory_mb": 1000, "images": 9, "source": "digits"}
        hello = Hello(start=self.start, lwfed="0", **rest)
        self.session = Session(TOPICS, hello, self.journal, work, self.link, wait_s, now, believe)
        for filter in TOPICS.for_device(self.id):
            self.link.subscribe(filter)
        self._do(self.session.begin())
        will = Will(TOPICS.from_device(self.id, "state"), messages.encode(State(state="lost", start=self.start)))
        self.link.open(self.id, will, self.queue.append)

    def step(self, now):
        waiting, self.queue[:] = list(self.queue), []
        for event in waiting:
            if self.exit is None:
                self._do(self.session.handle(event, now))
        if self.exit is None:
            self._do(self.session.poll(now))

    def _do(self, effects):
        for effect in effects:
            match effect:
                case events.Tell():
                    self.told.append(effect)
                case events.StartWorker() | events.Train() | events.EndWorker():
                    self.worker.append(effect)
                    if isinstance(effect, events.Train):
                        self.planned(effect.order)
                case events.Exit():
                    self.exit = effect
                case events.Show():
                    assert 0 <= effect.done <= effect.total
                case _:
                    self.link.execute(effect)

    def texts(self, event):
        return [line.text for line in self.told if line.event == event]

    def kill(self):
        """As SIGKILL does: nothing is said, the journal is as it was."""
        self.journal.close()
        self.link.reconnect()
        self.link.close()

    # What the worker says

    def ready(self, torch="2.9", onnxruntime=None):
        self.queue.append(events.WorkerReady(torch=torch, machine="x86", onnxruntime=onnxruntime))

    def planned(self, order):
        fixed = {"prefix": "torch", "micro_batch": 16} | (order["execution"] or {})
        fixed.pop("features_in", None)
        self.queue.append(events.WorkerPlanned(**fixed, reason="as configured", needs_mb=250.0))

    def finish(self, content=b"update" * 1000):
        self.places.out.write_bytes(content)
        memory = Memory(baseline_mb=200, peak_mb=300, peak_source="VmHWM", curve=())
        done = events.WorkerDone(self.places.out, images=9, skipped=1, steps=3, losses=(3.0, 2.0), seconds=1, memory=memory)
        self.queue.append(done)


class World:
    def __init__(self, root: Path) -> None:
        self.root, self.now, self.broker = root, 1000.0, MemoryBroker()
        self.server: Server | None = None
        self.device: Device | None = None

    def start_server(self, epoch=1, **options):
        self.server = Server(self.broker, self.root / "server", epoch, **options)
        return self.server

    def kill_server(self):
        self.broker.cut("server", reconnect=False)
        self.server.link.close()
        self.broker.restore("server")
        self.server = None

    def start_device(self, **options):
        self.device = Device(self.broker, self.root / "device", self.now, **options)
        return self.device

    def settle(self, seconds=1.0):
        """Let the time pass in which messages go to and fro."""
        end = self.now + seconds
        while self.now < end:
            for _ in range(3):
                self.broker.pump()
                for side in (self.server, self.device):
                    if side is not None:
                        side.step(self.now)
            self.now += 0.05
        self.broker.pump()

    def joined(self, **options):
        server, device = self.start_server(**options), self.start_device()
        self.settle(0.2)
        return server, device

    def training(self, stage=1, round=1, **options):
        """A device whose worker has been told to train."""
        server, device = self.joined(**options)
        server.announce(stage=stage, round=round)
        server.assign(device.id, stage=stage, round=round)
        self.settle(2)
        device.ready()
        self.settle(0.2)
        assert isinstance(device.worker[-1], events.Train)
        return server, device


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    if made.device is not None:
        made.device.journal.close()


@pytest.fixture
def server_class():
    return Server


@pytest.fixture
def one_thread():
    """torch has as many threads afterwards as before."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unmeasured(monkeypatch):
    """Plans are made in no time: what libraries take is not measured, and they stay mapped."""
    from lwfed.edge_agent import means, worker
    from lwfed.models import fitting

    for module in (means, worker, fitting):
        monkeypatch.setattr(module, "let_code_go", lambda: None)
    monkeypatch.setattr(fitting, "code_bytes", lambda *_: fitting.CODE_BYTES)


@pytest.fixture(scope="session")
def graphs(tmp_path_factory):
    """Of the layers of the small model that plans are made for."""
    from lwfed.models.graphs import make_graphs

    from .planning import config

    return make_graphs(config().model, ["onnx", "onnx_int8"], tmp_path_factory.mktemp("graphs"))
