"""A server and devices made of the transfer machines alone, over the broker in memory, in virtual time."""

from __future__ import annotations

from pathlib import Path
from random import Random

from lwfed.blobs import BlobStore
from lwfed.seeds import derive
from lwfed.transport.base import Connected, Event, Received
from lwfed.transport.memory import MemoryBroker
from lwfed.wire import topics as t
from lwfed.wire.broadcast import Broadcast
from lwfed.wire.download import Downloads
from lwfed.wire.inbox import Inbox
from lwfed.wire.messages import DOWN, UP, BlobRef, Done, Fin, Got, Grant, Manifest, Miss, Need, Offer, Refuse, Wait, decode
from lwfed.wire.report import Traffic
from lwfed.wire.upload import Upload, contribution_id

from .samples import REPORT

CHUNK_BYTES = 1024
TOPICS = t.Topics("test")
SERVER_WINDOW = 20


class Node:
    """A shell: one transport; every event is followed by a poll."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.transport = world.broker.transport()
        self.begin()
        for filter in self.filters():
            self.transport.subscribe(filter)
        self.transport.open(name, None, self.take)

    def take(self, event: Event) -> None:
        if isinstance(event, Received):
            topic = TOPICS.parse(event.topic)
            assert topic is not None
            self.receive(topic, event.payload)
        elif isinstance(event, Connected):
            self.reset()
        self.poll()

    def poll(self) -> None:
        if self.transport.connected:
            for command in self.commands(self.world.now):
                self.transport.execute(command)

    def restart(self) -> None:
        """Die and come back: only files remain."""
        self.world.broker.cut(self.name, reconnect=False)
        for filter in list(self.transport.filters):
            self.transport.unsubscribe(filter)
        self.begin()
        for filter in self.filters():
            self.transport.subscribe(filter)
        self.world.broker.restore(self.name)

    def begin(self) -> None: ...
    def reset(self) -> None: ...
    def filters(self): ...
    def commands(self, now): ...
    def receive(self, topic, payload): ...
    def next_wakeup(self, now): ...


class Server(Node):
    def __init__(self, world: World, folder: Path, slots: int, limit_bytes: int = 1 << 20) -> None:
        self.models = BlobStore(folder / "models", durable=False)
        self.spool = folder / "spool"
        self.slots = slots
        self.limit_bytes = limit_bytes
        self.recorded: dict[str, bytes] = {}
        self.recordings = 0
        super().__init__(world, "server")

    def begin(self) -> None:
        spool = BlobStore(self.spool, durable=False)
        self.broadcast = Broadcast(TOPICS, self.models, CHUNK_BYTES)
        self.inbox = Inbox(TOPICS, spool, self.limit_bytes, self.recorded.__contains__, self.slots)

    def filters(self):
        return [TOPICS.from_all_devices]

    def receive(self, topic, payload):
        now = self.world.now
        answers = []
        match topic:
            case t.FromDevice(device, kind):
                message = decode(UP[kind], payload)
                match message:
                    case Need():
                        self.broadcast.need(device, message, now)
                    case Got():
                        self.broadcast.got(device, message.chunks, now)
                    case Offer():
                        answers = self.inbox.offer(device, message, now)
                    case Fin():
                        answers, update = self.inbox.fin(device, message, now)
                        if update is not None:
                            self.recordings += update.offer.contribution not in self.recorded
                            self.recorded[update.offer.contribution] = update.path.read_bytes()
                            answers = [*answers, *self.inbox.accept(update.offer.contribution)]
            case t.UpdateChunk():
                answers = self.inbox.chunk(topic, payload, now)
        for command in answers:
            self.transport.execute(command)

    def commands(self, now):
        return [*self.inbox.poll(now), *self.broadcast.poll(now, SERVER_WINDOW - self.transport.pending)]

    def next_wakeup(self, now):
        return [self.broadcast.next_wakeup(now), self.inbox.next_wakeup(now)]


class Device(Node):
    def __init__(self, world: World, folder: Path, name: str, refs: list[BlobRef], update: bytes) -> None:
        self.folder = folder / name
        self.refs = refs
        self.update = update
        self.starts = self.chunks = 0
        super().__init__(world, name)

    def begin(self) -> None:
        self.starts += 1
        self.store = BlobStore(self.folder, durable=False)
        self.downloads = Downloads(TOPICS, self.name, self.store, seed=derive(self.starts, self.name))
        self.downloads.want(self.refs)
        ref = self.store.put(self.update)
        contribution = contribution_id("run", 1, 1, self.name, ref.id)
        manifest = self.store.manifest(ref.id, CHUNK_BYTES)
        offer = Offer(contribution=contribution, run="run", stage=1, round=1, participant=1, manifest=manifest, report=REPORT)
        self.upload = Upload(TOPICS, self.name, offer, self.store, seed=self.starts)

    def reset(self) -> None:
        self.downloads.reset()
        self.upload.reset()

    def filters(self):
        return TOPICS.for_device(self.name)

    def receive(self, topic, payload):
        match topic:
            case t.BlobChunk(blob, index):
                self.chunks += 1
                self.downloads.on_chunk(blob, index, payload)
            case t.ToDevice(_, kind):
                message = decode(DOWN[kind], payload)
                handlers = {
                    Manifest: self.downloads.on_manifest,
                    Grant: self.upload.on_grant,
                    Wait: self.upload.on_wait,
                    Miss: self.upload.on_miss,
                    Done: self.upload.on_done,
                    Refuse: self.upload.on_refuse,
                }
                handlers[type(message)](message)

    def commands(self, now):
        commands = self.downloads.poll(now)
        if self.downloads.complete:
            traffic = Traffic(down=self.transport.received_bytes, up=self.transport.sent_bytes)
            commands = [*commands, *self.upload.poll(now, self.upload.window - self.transport.pending, traffic)]
        return commands

    def next_wakeup(self, now):
        return [self.downloads.next_wakeup(now), self.upload.next_wakeup(now) if self.downloads.complete else None]

    @property
    def finished(self) -> bool:
        return self.downloads.complete and self.upload.state in ("done", "refused")


class World:
    """Time, the broker and everybody. `trouble(step)` may do harm between two steps."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.now = 0.0
        self.nodes: list[Node] = []

    def run(self, until, trouble=lambda: None, longest_s: float = 3600.0) -> None:
        while not until():
            trouble()
            while self.broker.pump(25):
                trouble()
            for node in self.nodes:
                node.poll()
            if self.broker.pump(25) or until():
                continue
            wakeups = [when for node in self.nodes for when in node.next_wakeup(self.now) if when is not None]
            assert wakeups, f"everybody sleeps at {self.now} s"
            assert min(wakeups) >= self.now
            self.now = min(wakeups)
            assert self.now < longest_s, "it never ends"


def blob(random: Random, size: int) -> bytes:
    return random.randbytes(size)
