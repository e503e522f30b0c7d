"""docs/BROKER.md, done: its files are made by its own commands, and its command lines connect."""

import contextlib
import os
import queue
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lwfed import errors
from lwfed.cli import Connection
from lwfed.transport import mqtt
from lwfed.transport.address import BrokerAddress
from lwfed.transport.base import Connected, Disconnected, Received
from lwfed.wire import topics

from .pages import check, text_of


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """A folder in which the page's files were made by its own commands, for a broker called localhost; and its port."""
    mosquitto = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if not mosquitto or not shutil.which("openssl") or not shutil.which("mosquitto_passwd"):
        pytest.skip("mosquitto or openssl is not installed")
    folder, port = tmp_path_factory.mktemp("broker"), free_port()
    make, *_ = text_of("docs/BROKER.md", "sh")
    acl, conf = text_of("docs/BROKER.md", "text")
    subprocess.run(["sh", "-e", "-c", make.replace("broker.example", "localhost")], cwd=folder, check=True, capture_output=True)
    (folder / "acl").write_text(acl + "\n")
    root = "user root\n" if os.geteuid() == 0 else ""
    (folder / "mosquitto.conf").write_text(conf.replace("8883", str(port)) + "\n" + root)
    broker = subprocess.Popen([mosquitto, "-c", "mosquitto.conf"], cwd=folder, stderr=subprocess.PIPE, text=True)
    said = []
    for line in broker.stderr:
        said.append(line)
        if line.rstrip().endswith("running"):
            break
    assert broker.poll() is None, said
    yield folder, port
    broker.terminate()
    broker.communicate(timeout=60)


def line_of(program, folder, port, **changes):
    """The page's own command line, for localhost, that port, and with further changes."""
    text = next(line for block in text_of("docs/BROKER.md", "sh") for line in block.splitlines() if line.startswith(program))
    for old, new in {"broker.example": f"localhost:{port}", **changes}.items():
        text = text.replace(old, str(new))
    words = shlex.split(text)
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


def test_the_documented_broker_refuses_a_wrong_password(documented, tmp_path):
    folder, port = documented
    words = line_of("edge-agent join", folder, port, **{"~/Pictures": "digits", "--username porch": "--username server"})
    done = subprocess.run([*words, "--state", tmp_path / "device"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == errors.Refused.exit_code, done.stdout + done.stderr


class Client:
    """The connection that a documented command line makes, without the rest of its program."""

    def __init__(self, folder, words, client_id, filters):
        given = check([Path(words[0]).name, *words[1:]]).params
        files = {name: folder / given[name] for name in ("password_file", "ca")}
        connection = Connection(username=given["username"], **files)
        self.transport = connection.transport(BrokerAddress.parse(given.get("url") or given["broker"]))
        self._events = queue.SimpleQueue()
        for filter in filters:
            self.transport.subscribe(filter)
        self.transport.open(client_id, None, self._events.put)
        self.next(Connected)

    def next(self, kind):
        while not isinstance(event := self._events.get(timeout=60), kind):
            pass
        return event


@pytest.fixture
def connect(documented, monkeypatch):
    monkeypatch.setattr(mqtt, "FIRST_DELAY_S", 0.01)
    folder, port = documented
    with contextlib.ExitStack() as stack:

        def connect(command, client_id, *filters):
            client = Client(folder, line_of(command, folder, port), client_id, filters)
            stack.callback(client.transport.close)
            return client

        yield connect


def test_the_documented_permissions_let_through_what_is_needed_and_no_more(connect):
    fleet = topics.Topics("default")
    server = connect("cloud-server serve", "lwfed-default-server", fleet.from_all_devices)
    for state in (fleet.server_state, fleet.run):
        server.transport.publish(state, b"retained", retain=True)
    device = connect("edge-agent join", "porch-1", *fleet.for_device("porch-1"), fleet.blob_chunks("ab"))
    assert {device.next(Received).topic, device.next(Received).topic} == {fleet.server_state, fleet.run}
    for topic in (fleet.blob_chunk("ab", 0), fleet.to_device("porch-1", "task")):
        server.transport.publish(topic, b"down")
        assert device.next(Received) == Received(topic, b"down")
    for topic in (fleet.from_device("porch-1", "hello"), fleet.update_chunk("porch-1", "w0", "cd", 0)):
        device.transport.publish(topic, b"up")
        assert server.next(Received) == Received(topic, b"up")
    for forbidden in (fleet.run, fleet.blob_chunk("ab", 0), fleet.from_device("another", "hello")):
        device.transport.publish(forbidden, b"forged")
        assert isinstance(device.next(Disconnected).reason, errors.Refused)
        device.next(Connected)


@pytest.mark.slow
def test_a_fleet_trains_through_the_documented_broker(documented):
    """Permissions as documented are enough for a whole run."""
    folder, port = documented
    small = "demo --set rounds.min_devices=1 --set data.devices=1 --set model.width=32 --set model.depth=1 --set stages.rounds_per_stage=1"
    short = " --set train.epochs=1 --set calibration.every=never --set evaluation.data=null --set train.batch_size=256"
    server = line_of("cloud-server serve", folder, port, **{"garden.yaml": small + short})
    agent = line_of("edge-agent join", folder, port, **{"~/Pictures": "digits"})
    with (folder / "agent.log").open("wb") as log:
        device = subprocess.Popen([*agent, "--state", folder / "device"], cwd=folder, stdout=log, stderr=log)
    try:
        words = [*server, "--state", folder / "run", "--until-done"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240)
    finally:
        device.terminate()
        device.wait(60)
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "agent.log").read_text()
