"""Devices of other machines: enrolment, permissions and revocation, over a real mosquitto and real TLS."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import threading
import time

import psutil
import pytest
from click.testing import CliRunner

from lwfed.cli import Connection
from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.cli import main as cloud_server
from lwfed.cloud_server.permissions import CONTROL
from lwfed.edge_agent import doctor, enrolment
from lwfed.edge_agent.cli import main as edge_agent
from lwfed.edge_agent.enrolment import enrol
from lwfed.edge_agent.identity import announcement_verifier, find_access
from lwfed.errors import ConfigError, Refused, StateError, Unreachable, Untrusted
from lwfed.transport import mqtt
from lwfed.transport.address import BrokerAddress, Credentials, TlsFiles
from lwfed.transport.base import Connected, Disconnected, Received, Sent
from lwfed.transport.mqtt import MqttTransport
from lwfed.wire.token import Token, digest

from .gates import PATIENCE_S, TOPICS, Client, Host, free_ports, plugin_missing

pytestmark = pytest.mark.skipif(plugin_missing(), reason="mosquitto or its dynamic security plugin is not installed")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with Host(tmp_path_factory.mktemp("host")) as made:
        yield made


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(mqtt, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(mqtt, "LONGEST_DELAY_S", 0.2)
    monkeypatch.setattr(enrolment, "AGAIN_S", 0.2)


@pytest.fixture(scope="module")
def enrolled(host, tmp_path_factory):
    """The state folder of a device by name, made once."""
    states = {}

    def enrolled(name):
        if name not in states:
            states[name] = tmp_path_factory.mktemp(name)
            assert enrol(host.invite(name), states[name], PATIENCE_S) == name
        return states[name]

    return enrolled


@pytest.fixture
def client():
    with contextlib.ExitStack() as stack:

        def client(*arguments):
            made = Client(*arguments)
            stack.callback(made.transport.close)
            return made

        yield client


@pytest.fixture
def device(enrolled, client):
    """An enrolled one that is connected, as the agent would be."""

    def device(name, *filters, client_id=None):
        access = find_access(None, Connection(), enrolled(name))
        return client(access.transport(), client_id or name, *filters)

    return device


def test_an_enrolled_device_does_what_it_needs_to_and_no_more(host, device):
    porch = device("porch", *TOPICS.for_device("porch"), TOPICS.blob_chunks("ab"))
    porch.next(Connected)
    for topic in (TOPICS.server_state, TOPICS.run, TOPICS.blob_chunk("ab", 0), TOPICS.to_device("porch", "task")):
        host.client.transport.publish(topic, b"down")
        assert porch.next(Received, Disconnected) == Received(topic, b"down")
    porch.transport.publish(TOPICS.from_device("porch", "hello"), b"up")
    porch.next(Sent)
    for forbidden in (
        TOPICS.from_device("shed", "state"), TOPICS.to_device("porch", "task"), TOPICS.to_device("shed", "task"), TOPICS.run,
        TOPICS.server_state, TOPICS.blob_chunk("ab", 0), TOPICS.from_token("ab"), TOPICS.to_token("ab"), CONTROL,
    ):  # fmt: skip
        porch.transport.publish(forbidden, b"forged")
        assert isinstance(porch.next(Disconnected, Received).reason, Refused), forbidden
        porch.next(Connected)
    assert ("porch", b"up") in host.said
    assert not any(payload == b"forged" for _, payload in host.said)


OTHERS = [TOPICS.to_device("shed", "task"), "lwfed/default/d/+/dn/+", "lwfed/default/#", "#", "lwfed/default/enrol/#", "$CONTROL/#"]


@pytest.mark.parametrize("filter", OTHERS)
def test_it_cannot_read_what_is_meant_for_others(device, filter):
    assert isinstance(device("porch", filter).outcome().reason, Refused)


def test_it_can_subscribe_to_its_own_topics_as_a_whole_only(device):
    """What a broker keeps for a filter grows with its levels."""
    assert isinstance(device("porch", TOPICS.to_device("porch", "task")).outcome().reason, Refused)


def test_it_cannot_throw_out_another_one_by_its_client_id(device, host):
    shed = device("shed", *TOPICS.for_device("shed"))
    shed.next(Connected)
    device("porch", client_id="shed").next(Connected)
    host.client.transport.publish(TOPICS.to_device("shed", "task"), b"still there")
    assert shed.next(Disconnected, Received) == Received(TOPICS.to_device("shed", "task"), b"still there")


def test_nobody_comes_in_without_a_certificate_of_this_authority(host, client, tmp_path):
    strange = Authority(tmp_path)
    cert, key = strange.issue(tmp_path, "porch")
    ours = host.gate.connection().ca
    token = host.invite("nobody").header
    enrolling = BrokerAddress("localhost", host.place.port + 1, tls=True)
    for address, credentials, files in (
        (host.gate.public_address, Credentials(), TlsFiles(ours)),
        (host.gate.public_address, Credentials("porch", ""), TlsFiles(ours)),
        (host.gate.public_address, Credentials(f"enrol.{token.id}", digest(token.secret)), TlsFiles(ours)),
        (host.gate.public_address, Credentials(), TlsFiles(ours, cert, key)),
        (enrolling, Credentials(), TlsFiles(ours)),
        (enrolling, Credentials("porch", ""), TlsFiles(ours)),
        (enrolling, Credentials("lwfed.server", ""), TlsFiles(ours)),
    ):
        outcome = client(MqttTransport(address, credentials, files), "stranger").outcome()
        assert isinstance(outcome, Disconnected), (address, credentials)


def test_a_token_reaches_its_own_topics_only(host, client):
    token, other = host.invite("once").header, host.invite("twice").header
    address = BrokerAddress("localhost", host.place.port + 1, tls=True)
    for filter in (TOPICS.run, TOPICS.to_token(other.id), TOPICS.from_all_tokens):
        transport = MqttTransport(address, Credentials(f"enrol.{token.id}", digest(token.secret)), TlsFiles(host.gate.connection().ca))
        one = client(transport, "x", filter)
        outcomes = (one.outcome() for _ in range(100))  # the broker hears of the token within a second
        assert any("subscribe" in str(outcome.reason) for outcome in outcomes)
        transport.close()


@pytest.fixture
def folder(tmp_path):
    def folder(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    return folder


def test_a_token_is_good_for_one_device(host, folder):
    token = host.invite("barn")
    assert enrol(token, folder("barn"), PATIENCE_S) == "barn"
    with pytest.raises(Refused, match="cloud-server revoke barn"):  # its device has not come yet
        enrol(token, folder("other"), PATIENCE_S)
    with pytest.raises(StateError, match="already, as device barn"):
        enrol(host.invite("stable"), folder("barn"), PATIENCE_S)
    access = find_access(None, Connection(), folder("barn"))
    barn = Client(access.transport(), "barn")
    barn.next(Connected)
    barn.transport.publish(TOPICS.from_device("barn", "state"), b"here")
    barn.transport.close()
    # Whoever was first has joined: the token's account is gone, or goes within a second.
    with pytest.raises(Refused, match="cloud-server revoke barn"):
        enrol(token, folder("other"), PATIENCE_S)
    host.until(lambda: f"enrol.{token.header.id}" not in (host.broker._folder / "permissions.json").read_text())
    with pytest.raises(Refused, match=r"does not accept this token.*cloud-server revoke barn"):
        enrol(token, folder("other"), PATIENCE_S)


def test_a_lost_answer_and_a_silent_server_cost_nothing_but_time(host, folder):
    token = host.invite("late")
    host.silent = True
    try:
        with pytest.raises(Unreachable, match="no server answers"):
            enrol(token, folder("late"), 2.0)
    finally:
        host.silent = False
    key = (folder("late") / "identity" / "key.pem").read_bytes()
    assert not (folder("late") / "identity" / "identity.json").exists()
    assert enrol(token, folder("late"), PATIENCE_S) == "late"
    assert (folder("late") / "identity" / "key.pem").read_bytes() == key


def test_a_device_that_is_enrolled_again_before_it_has_come_is_let_in_by_its_new_certificate_only(host, folder, client):
    for name in ("lost", "found"):
        assert enrol(host.invite("wall"), folder(name), PATIENCE_S) == "wall"
    lost, found = (client(find_access(None, Connection(), folder(name)).transport(), "wall") for name in ("lost", "found"))
    assert isinstance(lost.outcome().reason, Refused)
    found.next(Connected)
    found.transport.publish(TOPICS.from_device("wall", "state"), b"here again")
    host.until(lambda: ("wall", b"here again") in host.said)
    host.client.transport.publish(TOPICS.to_device("wall", "task"), b"task")
    assert found.next(Received, Disconnected) == Received(TOPICS.to_device("wall", "task"), b"task")
    host.beside.revoke("wall")
    while not isinstance(found.next(Disconnected).reason, Refused):
        pass  # it comes again before it is shut out


def test_what_a_device_keeps_is_its_owner_s_alone(enrolled):
    files = list((enrolled("porch") / "identity").iterdir())
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (enrolled("porch") / "identity").stat().st_mode & 0o777 == 0o700


class Impostor(threading.Thread):
    """Has taken the server's place on the network, with a certificate of its own authority for the same name."""

    def __init__(self, folder):
        super().__init__()
        self.heard = b""
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(*Authority(folder).issue(folder, "broker", ("localhost",)))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.start()

    def run(self):
        with self._listener:
            link, _ = self._listener.accept()
            with contextlib.suppress(OSError), self._context.wrap_socket(link, server_side=True) as tls:
                self.heard = tls.recv(1000)


def test_a_man_in_the_middle_is_told_nothing(host, folder):
    impostor = Impostor(folder("impostor"))
    token = host.invite("middle")
    led_astray = Token(token.header.model_copy(update={"port": impostor.port - 1}), token.authority)
    with pytest.raises(Untrusted, match="is not the server of this token"):
        enrol(led_astray, folder("middle"), PATIENCE_S)
    impostor.join(PATIENCE_S)
    assert impostor.heard == b""


def test_an_enrolled_device_believes_what_its_server_signs(host, enrolled):
    believe = announcement_verifier(enrolled("porch"), "default")
    assert believe(host.gate.sign(b"announcement")) == b"announcement"


def test_an_enrolled_device_does_not_follow_an_impostor_either(enrolled, client, folder):
    impostor = Impostor(folder("impostor"))
    access = find_access(f"mqtts://localhost:{impostor.port}", Connection(), enrolled("porch"))
    assert isinstance(client(access.transport(), "porch").outcome().reason, Untrusted)
    impostor.join(PATIENCE_S)
    assert impostor.heard == b""


def test_a_revoked_device_is_cut_off_within_seconds_and_for_good(host, device):
    gone, stays = (device(name, *TOPICS.for_device(name)) for name in ("gone", "stays"))
    gone.next(Connected)
    stays.next(Connected)
    before = time.monotonic()
    host.beside.revoke("gone")
    gone.next(Disconnected)
    assert time.monotonic() - before < 10
    assert isinstance(gone.next(Connected, Disconnected).reason, Refused)
    host.broker._process.send_signal(signal.SIGKILL)
    stays.next(Disconnected)
    stays.next(Connected)
    while not isinstance(gone.next(Disconnected).reason, Refused):
        pass  # until the broker is back


def test_a_revocation_that_the_broker_never_hears_of_is_carried_out_by_starting_it_again(host, device):
    drowns, stays = (device(name, *TOPICS.for_device(name)) for name in ("drowns", "stays"))
    drowns.next(Connected)
    stays.next(Connected)
    host.lose = 10**9
    before = time.monotonic()
    host.beside.revoke("drowns")
    try:
        while not isinstance(drowns.next(Disconnected).reason, Refused):
            pass  # until the broker is back
        assert time.monotonic() - before < 15
        stays.next(Connected)
    finally:
        host.lose = 0


def test_a_revocation_that_is_lost_on_its_way_to_the_broker_is_repeated_until_it_is_carried_out(host, device):
    clings = device("clings", *TOPICS.for_device("clings"))
    clings.next(Connected)
    host.lose = 2
    host.beside.revoke("clings")
    clings.next(Disconnected)
    assert host.lose == 0
    host.until(lambda: not host.gate._unconfirmed)
    assert '"clings"' not in (host.broker._folder / "permissions.json").read_text()


def test_it_listens_where_it_was_told_to(host):
    found = psutil.Process(host.broker.pid).net_connections()
    port = host.place.port
    assert {one.laddr for one in found if one.status == psutil.CONN_LISTEN} == {("127.0.0.1", port), ("127.0.0.1", port + 1)}


def test_keys_of_the_broker_are_its_owner_s_alone(host):
    names = ("broker.key", "lwfed.server.key", "permissions.json")
    assert {(host.broker._folder / name).stat().st_mode & 0o777 for name in names} == {0o600}


# The programs


def call(program, *words):
    return CliRunner().invoke(program, words)


def test_enrol_join_and_revoke(start, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    early = call(cloud_server, "enrol", "porch")
    assert (early.exit_code, "serve --listen" in early.stderr) == (73, True)
    settings = ("model.width=32", "model.depth=1", "evaluation.data=null", "calibration.every=never", "rounds.min_devices=2")
    sets = [f"--set={one}" for one in settings]
    server = start("cloud-server", "serve", "--config", "demo", *sets, "--listen", f"localhost:{free_ports()}", "--json")
    assert server.wait_for("broker", kind="mosquitto")["url"].startswith("mqtts://localhost:")
    token = call(cloud_server, "enrol", "porch").stdout.strip()
    place = tmp_path / "my state"
    enrolling = CliRunner().invoke(edge_agent, ["enrol", "-", "--state", str(place)], input=f"{token}\n")
    assert enrolling.stdout == f"enrolled as porch; now: edge-agent join --data FOLDER --state '{place}'\n"
    device = start("edge-agent", "join", "--data", "digits", "--state", str(place), "--json")
    assert device.wait_for("joined")["device"] == "porch"
    server.wait_for("device", status="joined", device="porch")
    device.wait_for("run", run=server.all_said("run")[0]["id"])  # announced with the right signature
    before = time.monotonic()
    assert call(cloud_server, "revoke", "porch").exit_code == 0
    assert "Administrative action" in device.wait_for("disconnected")["reason"]
    assert "it may have been revoked (`cloud-server status` says so)" in device.wait_for("disconnected")["reason"]
    assert time.monotonic() - before < 10
    server.wait_for("device", status="is revoked", device="porch")
    monkeypatch.setattr(doctor, "_torch", lambda: iter(()))
    assert re.search("does not let.*may have been revoked", call(edge_agent, "doctor", "--state", str(place)).stdout, re.DOTALL)
    assert call(cloud_server, "enrol", "shed").exit_code == 0
    shown = call(cloud_server, "status").stdout
    assert re.search(r"device 0    revoked; porch,.*\ninvited     shed \(its token is good .*\nrevoked     porch \(", shown)
    found = json.loads(call(cloud_server, "status", "--json").stdout)
    admissions = found["admissions"]
    assert [one["presence"] for one in found["devices"]] == ["revoked"]
    assert ([*admissions["invited"]], [*admissions["revoked"]]) == (["shed"], ["porch"])
    again = call(cloud_server, "enrol", "porch")
    assert (again.exit_code, "choose another name" in again.stderr) == (73, True)
    assert (device.end(), server.end()) == (0, 0)
    os.rename(tmp_path / "cloud-server" / "_authority" / "authority.pem", tmp_path / "away.pem")
    without = call(cloud_server, "serve", "--config", "demo", *sets, "--listen", "localhost", "--json")
    assert (without.exit_code, "authority.pem is missing: put it back" in without.stderr) == (StateError.exit_code, True)
    secret = Token.parse(token).header.secret
    for said in (server.transcript(), device.transcript(), (tmp_path / "cloud-server" / "demo" / "broker" / "broker.log").read_text()):
        assert secret not in said
        assert digest(secret) not in said


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--listen", "0.0.0.0"], "in their tokens"),
        (["--listen", "garden.local", "--broker", "embedded"], "mosquitto started here"),
        (["--listen", "garden.local", "--broker", "mqtts://broker.example"], "mosquitto started here"),
        (["--listen", "garden.local", "--port", "1884"], "garden.local:1884"),
        (["--broker", "mqtt://broker.example"], "--insecure"),
    ],
)
def test_what_cannot_be_served_safely_is_refused(tmp_path, monkeypatch, options, text):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    settings = ("--set", "evaluation.data=null", "--set", "calibration.every=never", "--state", str(tmp_path / "run"))
    result = call(cloud_server, "serve", "--config", "demo", *settings, *options)
    assert (result.exit_code, text in result.stderr) == (ConfigError.exit_code, True), result.stderr
