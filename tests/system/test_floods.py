"""An enrolled device that floods the broker: the server goes on after it, nothing stays, and revoking it ends it at once."""

import contextlib
import ssl
import threading
import time

import paho.mqtt.client as paho
import pytest
from click.testing import CliRunner
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from lwfed.cli import Connection
from lwfed.cloud_server.cli import main as cloud_server
from lwfed.cloud_server.permissions import SERVER
from lwfed.edge_agent.enrolment import enrol
from lwfed.edge_agent.identity import find_access
from lwfed.transport.address import BrokerAddress
from lwfed.transport.base import Connected, Received
from lwfed.transport.mqtt import STABLE_S
from lwfed.wire.token import Token

from .gates import PATIENCE_S, TOPICS, Client, free_ports, plugin_missing

pytestmark = pytest.mark.skipif(plugin_missing(), reason="mosquitto or its dynamic security plugin is not installed")

AT_ONCE, UNDER_WAY = 50, 300
SETTINGS = ("model.width=32", "model.depth=1", "evaluation.data=null", "calibration.every=never", "rounds.min_devices=2")


class Flooder:
    """With the certificate of an enrolled device, and no agent: small messages as fast as the broker takes them."""

    def __init__(self, state, port):
        folder = state / "identity"
        context = ssl.create_default_context(cafile=folder / "authority.pem")
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="evil", protocol=MQTTProtocolVersion.MQTTv5, reconnect_on_failure=False
        )
        self._client.tls_set_context(context)
        self.ended = threading.Event()
        self._client.on_disconnect = lambda *_: self.ended.set()
        self._client.connect("localhost", port)
        self._client.loop_start()
        self._number = 0

    def send(self, number, retained):
        """So many messages, unless it is thrown out before."""
        last = self._number + number
        while self._number < last and not self.ended.is_set():
            if len(self._client._out_packet) > UNDER_WAY:
                time.sleep(0.005)
                continue
            for _ in range(AT_ONCE):
                self._number += 1
                topic = f"{self._number:x}" if retained else "beat"
                self._client.publish(TOPICS.from_device("evil", topic), b"z", retain=retained)

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def port():
    return free_ports()


@pytest.fixture
def fleet(start, tmp_path, monkeypatch, port):
    """A server, and the folders of the devices that it has enrolled."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    settings = [f"--set={one}" for one in SETTINGS]
    server = start("cloud-server", "serve", "--config", "demo", *settings, "--listen", f"localhost:{port}", "--json")
    server.wait_for("broker")

    def enrolled(name):
        token = CliRunner().invoke(cloud_server, ["enrol", name], catch_exceptions=False).stdout.strip()
        (tmp_path / name).mkdir()
        enrol(Token.parse(token), tmp_path / name, PATIENCE_S)
        return tmp_path / name

    return server, enrolled


def answers(device):
    """Wait until the server answers a device, which asks once a second."""
    while True:
        device.transport.publish(TOPICS.from_device("porch", "hello"), b'{"v": 9999}')
        with contextlib.suppress(Exception):
            while device.next(Received, timeout=1.0).topic != TOPICS.to_device("porch", "refuse"):
                pass
            return


def left(folder, port):
    """What devices have left at the broker but for their state, as the server sees it, which is thrown out for that."""
    access = Connection(ca=folder / "authority.pem", cert=folder / f"{SERVER}.pem", key=folder / f"{SERVER}.key")
    client = Client(access.transport(BrokerAddress("localhost", port, tls=True)), SERVER, TOPICS.from_all_devices)
    client.next(Connected)
    time.sleep(0.3)
    client.transport.close()
    found = []
    while not client.events.empty():
        found.append(client.events.get())
    return [one for one in found if isinstance(one, Received) and one.payload and not one.topic.endswith("/state")]


@pytest.mark.parametrize("number", [1_000, pytest.param(400_000, marks=pytest.mark.slow)])
def test_a_server_goes_on_after_a_flood_clears_what_it_left_and_revokes_under_it(fleet, tmp_path, port, number):
    server, enrolled = fleet
    porch = Client(find_access(None, Connection(), enrolled("porch")).transport(), "porch", *TOPICS.for_device("porch"))
    flooder = Flooder(enrolled("evil"), port)
    try:
        porch.next(Connected)
        answers(porch)
        for retained in (False, True):
            flooder.send(number, retained)
            answers(porch)
        endless = threading.Thread(target=flooder.send, args=(10**9, False))
        endless.start()
        time.sleep(1.0)
        assert CliRunner().invoke(cloud_server, ["revoke", "evil"]).exit_code == 0
        assert flooder.ended.wait(15.0)
        endless.join()
        server.wait_for("warning", code="retained")
        answers(porch)
        while left(tmp_path / "cloud-server" / "demo" / "broker", port):
            time.sleep(STABLE_S)  # a server that is thrown out more often comes back later each time
        answers(porch)
    finally:
        flooder.close()
        porch.transport.close()
