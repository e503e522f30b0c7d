"""Devices of a fleet in virtual time: the transfer machines of real ones, and numpy in place of torch."""

import itertools
from collections import Counter
from functools import lru_cache

import numpy as np

from lwfed.blobs import BlobStore
from lwfed.config import RunConfig
from lwfed.models.shapes import part_shapes, shapes
from lwfed.plan import VARIANCE
from lwfed.seeds import derive
from lwfed.transport.base import Connected, Received, Will
from lwfed.wire import deltas, messages, tensors
from lwfed.wire.download import Downloads
from lwfed.wire.messages import Offer, encode
from lwfed.wire.report import Execution, Memory, Report, Traffic
from lwfed.wire.signed import unverified
from lwfed.wire.topics import ToDevice, Topics
from lwfed.wire.upload import Upload, contribution_id

PROCESSES = itertools.count(1)  # of agents


@lru_cache(maxsize=2048)
def drawn(shape, *labels):
    """Random tensors that depend on nothing but the labels, of which the last may be a tensor's name; not to be written to."""
    stream = derive(0, "test", *labels)
    found = np.random.RandomState([stream & 0xFFFFFFFF, stream >> 32]).normal(size=shape).astype(np.float32)
    found = np.abs(found) if str(labels[-1]).endswith(VARIANCE) else found
    found.flags.writeable = False
    return found


def report(images=10, loss=1.0, peak_mb=300.0):
    memory = Memory(baseline_mb=200, peak_mb=peak_mb, peak_source="VmHWM", curve=())
    execution = Execution(prefix="torch", micro_batch=16, precision="fp32", threads=1, torch="2", machine="x86_64")
    return Report(images=images, skipped=0, steps=3, losses=(loss,), seconds=1, memory=memory, execution=execution)


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
                    self.done_task = None
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
        return deltas.encode({name: update[name] - received[name] for name in update}, config.transfer.codec, 1.0, seed).data

    def next_wakeup(self, now):
        if self.online is None or not self.online.online:
            return None
        times = [self.ready_at, self.downloads.next_wakeup(now), self.upload.next_wakeup(now) if self.upload else None]
        return min((time for time in times if time is not None), default=None)
