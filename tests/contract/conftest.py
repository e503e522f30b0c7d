"""Every implementation of the transport behind one face, so that one suite of tests holds for all."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lwfed.tools.load.link import Connections, PolledTransport
from lwfed.transport import mqtt
from lwfed.transport.address import BrokerAddress
from lwfed.transport.base import Connected, Disconnected, Event, Received, Transport, Will
from lwfed.transport.memory import MemoryBroker
from lwfed.transport.mqtt import MqttTransport

PATIENCE_S = 60.0
MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")
AMQTT = """
import asyncio, logging, sys
from amqtt.broker import Broker
async def main():
    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    broker = Broker({"listeners": {"default": {"type": "tcp", "bind": "127.0.0.1:" + sys.argv[1]}}, "plugins": plugins})
    await broker.start()
    print("running", flush=True)
    await asyncio.Event().wait()
logging.disable(logging.CRITICAL)
asyncio.run(main())
"""


class Client:
    """A transport with a record of what it delivered."""

    def __init__(self, network: Network, name: str, transport: Transport) -> None:
        self.name = name
        self.transport = transport
        self.events: list[Event] = []
        self._network = network

    def open(self, will: Will | None = None, *filters: str) -> Client:
        for filter in filters:
            self.transport.subscribe(filter)
        self.transport.open(self.name, will, self._take)
        return self

    def up(self, will: Will | None = None, *filters: str) -> Client:
        self.open(will, *filters)
        self.wait(lambda: self.count(Connected) == 1, "a connection")
        return self

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def received(self) -> list[tuple[str, bytes]]:
        """This network's messages: amqtt also sends retained ones to clients that never asked for them."""
        return [(event.topic, event.payload) for event in self._mine()]

    def retained(self) -> set[bytes]:
        """The payloads that the broker keeps."""
        return {event.payload for event in self._mine() if event.retained}

    def _mine(self) -> Iterator[Received]:
        return (event for event in self.events if isinstance(event, Received) and event.topic.startswith(self._network.base))

    def failures(self) -> list[Exception]:
        return [event.reason for event in self.events if isinstance(event, Disconnected)]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        assert self._network.wait(condition), f"{self.name} waited for {what}; it saw {self.events[-5:]}"

    def _take(self, event: Event) -> None:
        self._network.note(lambda: self.events.append(event))


class Network(ABC):
    """Brings about clients of one broker and waits for what happens to them."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.base = f"test/{uuid.uuid4().hex}"

    def client(self, name: str = "client") -> Client:
        client = Client(self, f"{name}-{uuid.uuid4().hex[:8]}", self.transport())
        self.clients.append(client)
        return client

    def topic(self, rest: str) -> str:
        return f"{self.base}/{rest}"

    def close(self) -> None:
        for client in self.clients:
            client.transport.close()

    def note(self, change: Callable[[], None]) -> None:
        change()

    @abstractmethod
    def transport(self) -> Transport: ...

    @abstractmethod
    def unreachable(self) -> Transport:
        """A transport to a broker that is not there."""

    @abstractmethod
    def wait(self, condition: Callable[[], bool]) -> bool: ...


class MemoryNetwork(Network):
    def __init__(self) -> None:
        super().__init__()
        self.broker = MemoryBroker()

    def transport(self) -> Transport:
        return self.broker.transport()

    def unreachable(self) -> Transport:
        self.broker.stop()
        return self.broker.transport()

    def wait(self, condition: Callable[[], bool]) -> bool:
        self.broker.pump()
        return condition()


class MqttNetwork(Network):
    def __init__(self, port: int, old_version: bool = False) -> None:
        super().__init__()
        self.port = port
        self._old_version = old_version
        self._changed = threading.Condition()

    def transport(self) -> MqttTransport:
        transport = MqttTransport(BrokerAddress("127.0.0.1", self.port))
        transport._version5 = not self._old_version
        return transport

    def unreachable(self) -> Transport:
        return MqttTransport(BrokerAddress("127.0.0.1", free_port()))

    def note(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, PATIENCE_S)


class PolledNetwork(Network):
    """Clients on the thread of the test."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self._connections = Connections()

    def transport(self) -> Transport:
        return PolledTransport(self._connections, BrokerAddress("127.0.0.1", self.port))

    def unreachable(self) -> Transport:
        return PolledTransport(self._connections, BrokerAddress("127.0.0.1", free_port()))

    def wait(self, condition: Callable[[], bool]) -> bool:
        until = time.monotonic() + PATIENCE_S
        while not condition() and time.monotonic() < until:
            self._connections.poll(PATIENCE_S)
        return condition()

    def close(self) -> None:
        super().close()
        self._connections.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Process:
    """A broker as a child process; returns from `__enter__` when it says that it runs."""

    def __init__(self, *command: str) -> None:
        self._command = command

    def __enter__(self) -> Process:
        self._child = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._child.stdout is not None
        seen = []
        for line in self._child.stdout:
            seen.append(line)
            if "running" in line:
                return self
        self.__exit__()
        raise AssertionError(f"{self._command[0]} did not start: {''.join(seen)}")

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()


def mosquitto(folder: Path, port: int, *lines: str) -> Process:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    settings = folder / f"mosquitto-{port}.conf"
    # As root it would become a user that cannot read the test's files. Its log says when it is ready.
    settings.write_text("\n".join(("user root", "log_dest stderr", f"listener {port} 127.0.0.1", *lines, "")))
    return Process(MOSQUITTO, "-c", str(settings))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "FIRST_DELAY_S", 0.01)


@pytest.fixture(scope="session")
def amqtt_port() -> Iterator[int]:
    pytest.importorskip("amqtt")
    port = free_port()
    with Process(sys.executable, "-W", "ignore", "-c", AMQTT, str(port)):
        yield port


@pytest.fixture(scope="session")
def mosquitto_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with mosquitto(tmp_path_factory.mktemp("mosquitto"), port, "allow_anonymous true"):
        yield port


@pytest.fixture(params=["memory", "amqtt", "mosquitto-5", "mosquitto-3.1.1", "polled-amqtt", "polled-mosquitto"])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    made: Network
    if request.param == "memory":
        made = MemoryNetwork()
    elif request.param.startswith("polled"):
        made = PolledNetwork(request.getfixturevalue(f"{request.param.partition('-')[2]}_port"))
    elif request.param == "amqtt":
        made = MqttNetwork(request.getfixturevalue("amqtt_port"))
    else:
        made = MqttNetwork(request.getfixturevalue("mosquitto_port"), old_version=request.param.endswith("3.1.1"))
    yield made
    made.close()
