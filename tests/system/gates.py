"""A gate with its mosquitto, and clients of both: what the tests of devices of other machines share."""

import contextlib
import queue
import socket
import threading
import time

from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.broker import ManagedBroker, find_mosquitto
from lwfed.cloud_server.enrolment import invite
from lwfed.cloud_server.gate import Gate, Place, find_plugin
from lwfed.cloud_server.permissions import ANSWERS, CONTROL
from lwfed.cloud_server.registry import Registry
from lwfed.errors import MissingDependency
from lwfed.transport.base import Connected, Disconnected, Received
from lwfed.wire.topics import FromDevice, FromToken, Topics

TOPICS = Topics("default")
PATIENCE_S = 60.0


def plugin_missing():
    try:
        find_plugin()
    except MissingDependency:
        return True
    return find_mosquitto() is None


def free_ports():
    """The first of two neighbours."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one, contextlib.suppress(OSError):
            port = one.getsockname()[1]
            socket.create_server(("127.0.0.1", port + 1)).close()
            return port


class Client:
    def __init__(self, transport, client_id, *filters):
        self.transport, self.events = transport, queue.SimpleQueue()
        for filter in filters:
            transport.subscribe(filter)
        transport.open(client_id, None, self.events.put)

    def next(self, *kinds, timeout=PATIENCE_S):
        while not isinstance(event := self.events.get(timeout=timeout), kinds):
            pass
        return event

    def outcome(self):
        """How the first attempt to connect ended."""
        return self.next(Connected, Disconnected)


class Host:
    """Gate and broker of a server, and the little that a server does with them, on a thread."""

    def __init__(self, root):
        self.folder, self.said, self.silent = root / "authority", [], False
        self.lose = 0  # so many of the next messages to the broker's plugin
        self.folder.mkdir()
        self.place = Place("localhost", free_ports())
        self.beside = Registry(self.folder)  # of `enrol` and `revoke`
        self._root, self._ready, self._ended = root, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        self.beside.close()

    def _run(self):
        with contextlib.ExitStack() as stack:
            self.gate = Gate(self.folder, self.place, "default")
            stack.callback(self.gate.close)
            self.broker = ManagedBroker("mosquitto", 0, self._root / "broker", 122_880, self.gate)
            self.broker.start()
            self.gate.advertise()
            stack.callback(self.broker.close)
            transport = self.gate.connection().transport(self.broker.address)
            self.client = Client(transport, "server", TOPICS.from_all_devices, *self.gate.filters)
            stack.callback(transport.close)
            self._handle(self.client.next(Connected))
            self._ready.set()
            while not self._ended.is_set():
                with contextlib.suppress(queue.Empty):
                    self._handle(self.client.events.get(timeout=0.05))
                self._execute(self.gate.poll(time.monotonic()))
                if self.gate.take_unheeded(time.monotonic()):
                    self.broker.kill("did not confirm it, and")

    def _handle(self, event):
        match event:
            case Disconnected():
                self.broker.ensure()
            case Received(topic, payload) if topic == ANSWERS:
                self.gate.on_answer(payload)
            case Received(topic, payload):
                match TOPICS.parse(topic):
                    case FromToken(token) if not self.silent:
                        self._execute(self.gate.answer(token, payload))
                    case FromDevice(device):
                        self.gate.seen(device)
                        self.said.append((device, payload))

    def _execute(self, commands):
        for command in commands:
            if command.topic == CONTROL and self.lose:
                self.lose -= 1
            else:
                self.client.transport.execute(command)

    def until(self, condition):
        by = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < by
            time.sleep(0.01)

    def invite(self, name):
        return invite(Authority(self.folder), self.beside, name)
