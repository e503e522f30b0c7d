import errno
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from lwfed.cloud_server import broker as managed
from lwfed.cloud_server import watch
from lwfed.cloud_server.broker import ManagedBroker, find_mosquitto
from lwfed.descriptors import ENOUGH
from lwfed.errors import PortInUse, StateError, Unreachable
from lwfed.transport.base import Connected, Disconnected, Received
from lwfed.transport.mqtt import MqttTransport
from lwfed.wire.messages import MAX_MESSAGE_BYTES
from lwfed.wire.upload import PACKET_MARGIN_BYTES

KINDS = [
    "embedded",
    pytest.param("mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")),
]


@pytest.fixture
def broker(tmp_path):
    brokers = []

    def broker(kind, port=0):
        brokers.append(ManagedBroker(kind, port, tmp_path / "broker", 122_880))
        return brokers[-1]

    yield broker
    for one in brokers:
        one.close()


@pytest.mark.parametrize("kind", KINDS)
def test_it_carries_messages_on_a_free_port_and_is_started_again(broker, kind, tmp_path):
    one = broker(kind)
    one.start()
    assert one.address.port > 0
    assert listening(one) == {"127.0.0.1"}
    assert not one.ensure()
    exchange(one)
    os.kill(one.pid, signal.SIGKILL)
    psutil.Process(one.pid).wait(60)
    port = one.address.port
    assert one.ensure()
    assert one.address.port == port
    exchange(one)
    if kind == "embedded":
        assert (tmp_path / "broker" / "broker.log").read_bytes() == b""


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_takes_too_much_memory_is_started_again_and_it_is_said_why(broker, kind, monkeypatch):
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.01)
    one = broker(kind)
    one.start()
    exchange(one)
    with monkeypatch.context() as patch:
        patch.setattr(watch, "MEMORY_BYTES", 1e6)
        psutil.Process(one.pid).wait(60)
    assert re.fullmatch(r"the broker took \d+ MB of memory, 1 are its limit: .*; it was started again", one.ensure())
    exchange(one)
    os.kill(one.pid, signal.SIGKILL)
    psutil.Process(one.pid).wait(60)
    assert one.ensure() == "the broker had died and was started again"


def test_it_may_have_more_connections_than_the_server(broker):
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, allowed[1]), allowed[1]))
    try:
        one = broker("embedded")
        one.start()
        assert resource.prlimit(one.pid, resource.RLIMIT_NOFILE) == (min(ENOUGH, allowed[1]), allowed[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


def test_its_log_stays_small_however_much_it_says(broker, monkeypatch, tmp_path):
    """Its end is kept, and what comes then."""
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(watch, "LOG_BYTES", 10_000)
    text = (
        "import socket, sys\n"
        "for number in range(10_000): print('line', number, file=sys.stderr)\n"
        "listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "link = listener.accept(); link = listener.accept(); print('the last', file=sys.stderr, flush=True); listener.accept()"
    )
    one = broker("embedded")
    monkeypatch.setattr(one, "_embedded", lambda: [sys.executable, "-c", text, str(one._port)])
    one.start()
    log = tmp_path / "broker" / "broker.log"
    until(lambda: log.stat().st_size <= 10_000 and log.read_text().endswith("line 9999\n"))
    assert all(line.startswith("line ") for line in log.read_text().splitlines())
    with socket.create_connection((one.address.host, one.address.port)):
        until(lambda: log.read_text().endswith("line 9999\nthe last\n"))


@pytest.mark.parametrize("how", ["killed", "refused"])
def test_one_that_could_not_be_started_again_can_be_later(broker, monkeypatch, how):
    one = broker("embedded")
    assert not one.ensure(), "nobody has wanted one yet"
    one.start()
    os.kill(one.pid, signal.SIGKILL)
    psutil.Process(one.pid).wait(60)

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            if how == "refused":
                raise BlockingIOError(11, "Resource temporarily unavailable")
            super().__init__(*args, **options)
            self.kill()

    with monkeypatch.context() as patch:
        patch.setattr(managed.subprocess, "Popen", Popen)
        with pytest.raises((Unreachable, StateError), match=r"ended with code -9|Resource temporarily unavailable"):
            one.ensure()
    assert one.ensure()
    exchange(one)
    one.close()
    assert not one.ensure(), "nobody wants one any more"


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_client_of_an_id_throws_out_the_first(broker, kind):
    one = broker(kind)
    one.start()
    clients = [MqttTransport(one.address) for _ in range(2)]
    events = [queue.SimpleQueue() for _ in clients]
    try:
        for client, seen in zip(clients, events, strict=True):
            client.subscribe("to/both")
            client.open("the-same", None, seen.put)
            assert isinstance(seen.get(timeout=60), Connected)
        assert isinstance(events[0].get(timeout=60), Disconnected)
        clients[1].publish("to/both", b"heard")
        assert any(isinstance(events[1].get(timeout=60), Received) for _ in range(2))
    finally:
        for client in clients:
            client.close()


def until(condition):
    by = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < by
        time.sleep(0.01)


def listening(broker):
    """The addresses."""
    connections = psutil.Process(broker.pid).net_connections()
    return {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}


def exchange(broker, retain=False):
    events = queue.Queue()
    transport = MqttTransport(broker.address)
    transport.subscribe("lwfed/test")
    transport.open("test", None, events.put)
    event = events.get(timeout=60)
    assert isinstance(event, Connected), event
    transport.publish("lwfed/test", b"hello", retain=retain)
    while not isinstance(event, Received):
        event = events.get(timeout=60)
    assert event.payload == b"hello"
    transport.close()
    return transport


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_mosquitto_takes_no_larger_messages_than_it_must_and_keeps_none_on_disk(broker, tmp_path):
    one = broker("mosquitto")
    one.start()
    transport = exchange(one, retain=True)
    assert transport.packet_limit == MAX_MESSAGE_BYTES + PACKET_MARGIN_BYTES
    one.close()
    assert {path.name for path in (tmp_path / "broker").iterdir()} == {"mosquitto.conf", "broker.log"}


def test_a_port_in_use_is_explained(broker, monkeypatch):
    monkeypatch.setattr(managed, "RELEASE_S", 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"127\.0\.0\.1:{port}.*--port"):
            broker("embedded", port).start()


def test_a_lack_of_sockets_is_no_port_in_use(broker, monkeypatch):
    """It passes; whoever has the port stays."""

    def none_left(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(managed, "RELEASE_S", 0)
    monkeypatch.setattr(managed.socket, "socket", none_left)
    with pytest.raises(Unreachable, match="Too many open files"):
        broker("embedded", 1883).start()


def test_a_broker_that_fails_says_what_it_said(broker, monkeypatch):
    one = broker("embedded")
    monkeypatch.setattr(one, "_embedded", lambda: [sys.executable, "-c", "import sys; sys.exit('no such option')"])
    with pytest.raises(Unreachable, match="no such option"):
        one.start()


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_with_a_server_that_is_killed(kind, tmp_path):
    code = (
        "import sys; from pathlib import Path; from lwfed.cloud_server.broker import ManagedBroker\n"
        f"broker = ManagedBroker({kind!r}, 0, Path({str(tmp_path)!r}), 122_880)\n"
        "broker.start(); print(broker.pid, flush=True); sys.stdin.read()"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    broker = psutil.Process(int(server.stdout.readline()))
    server.kill()
    server.communicate()
    assert psutil.wait_procs([broker], timeout=60)[1] == []


def test_the_embedded_broker_listens_on_loopback_only():
    command = [sys.executable, "-m", "lwfed.cloud_server.embedded", "0.0.0.0", "1883"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "loopback" in result.stderr
