"""What only the transport over MQTT has: versions, refusals, TLS, limits."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from lwfed.errors import ConfigError, Refused, TransportError, Unreachable
from lwfed.transport import mqtt_session
from lwfed.transport.address import BrokerAddress, Credentials, TlsFiles
from lwfed.transport.base import Connected, Disconnected, Received, Sent, Will
from lwfed.transport.mqtt import MqttTransport

from .conftest import Client, MqttNetwork, free_port, mosquitto


class Custom(MqttNetwork):
    """A network whose transports are made as the test wants."""

    def __init__(self, port: int, **arguments) -> None:
        super().__init__(port)
        self.arguments = arguments

    def transport(self) -> MqttTransport:
        return MqttTransport(**{"address": BrokerAddress("127.0.0.1", self.port), **self.arguments})


@pytest.fixture
def custom(request):
    """Makes networks and closes their transports at the end."""
    made = []

    def make(port: int, **arguments) -> Custom:
        made.append(Custom(port, **arguments))
        return made[-1]

    yield make
    for network in made:
        network.close()


def first_failure(client: Client) -> Exception:
    client.wait(lambda: client.count(Disconnected) >= 1, "a failure")
    client.transport.close()
    return client.failures()[0]


def test_mosquitto_is_spoken_to_in_mqtt_5(custom, mosquitto_port):
    client = custom(mosquitto_port).client().up()
    assert client.transport.protocol == "5"


def test_amqtt_is_spoken_to_in_3_1_1_even_with_a_will(custom, amqtt_port):
    client = custom(amqtt_port).client().up(Will("a/b", b"lost"))
    assert client.transport.protocol == "3.1.1"
    client.transport.reconnect()
    client.wait(lambda: client.count(Connected) == 2, "the new connection")
    assert client.transport.protocol == "3.1.1"


@pytest.mark.parametrize("old_version", [False, True])
def test_a_wrong_password_is_refused(custom, tmp_path, old_version):
    tool = shutil.which("mosquitto_passwd")
    if tool is None:
        pytest.skip("mosquitto is not installed")
    subprocess.run([tool, "-b", "-c", tmp_path / "passwords", "device", "secret"], check=True, capture_output=True)
    port = free_port()
    with mosquitto(tmp_path, port, "allow_anonymous false", f"password_file {tmp_path / 'passwords'}"):
        custom(port, credentials=Credentials("device", "secret")).client().up()
        for credentials in (Credentials("device", "wrong"), Credentials()):
            client = custom(port, credentials=credentials).client()
            client.transport._version5 = not old_version
            reason = first_failure(client.open())
            assert isinstance(reason, Refused)
            assert "--password-file" in str(reason)
            assert "wrong" not in str(reason)


def test_a_message_over_the_brokers_limit_is_an_error_and_not_a_loop(custom, tmp_path):
    port = free_port()
    with mosquitto(tmp_path, port, "allow_anonymous true", "max_packet_size 20000"):
        client = custom(port).client().up()
        assert client.transport.packet_limit == 20000
        with pytest.raises(TransportError, match="accepts 20000: raise its maximum packet size"):
            client.transport.publish("x", bytes(20_000))
        client.transport.publish("x", bytes(10_000))
        client.wait(lambda: client.count(Sent) == 1, "the small one")
        assert client.count(Disconnected) == 0


def test_a_small_receive_maximum_is_heeded(custom, tmp_path):
    port = free_port()
    with mosquitto(tmp_path, port, "allow_anonymous true", "max_inflight_messages 3"):
        network = custom(port)
        listener = network.client().up(None, network.topic("#"))
        sender = network.client().up()
        for index in range(50):
            sender.transport.publish(network.topic(str(index)), bytes(1000))
        listener.wait(lambda: len(listener.received()) == 50, "all messages")
        assert sender.count(Disconnected) == 0


def test_a_forbidden_publish_is_reported(custom, tmp_path):
    (tmp_path / "permissions").write_text("topic read x\n")
    port = free_port()
    with mosquitto(tmp_path, port, "allow_anonymous true", f"acl_file {tmp_path / 'permissions'}"):
        client = custom(port).client().up()
        client.transport.publish("x", b"")
        reason = first_failure(client)
        assert isinstance(reason, Refused)
        assert "does not let us publish" in str(reason)


def test_two_clients_of_the_same_name_are_told(custom, mosquitto_port):
    """They take the session from each other for ever, and mosquitto 2.0 does not say why it hangs up."""
    network = custom(mosquitto_port)
    first, second = network.client(), network.client()
    second.name = first.name
    first.open()
    second.open()
    first.wait(lambda: any("--name" in str(reason) for reason in first.failures() + second.failures()), "a hint")


def test_a_server_that_hangs_up_is_asked_in_both_versions(custom):
    greetings = []

    def serve(server: socket.socket) -> None:
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                greetings.append(connection.recv(100)[8])

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        reason = first_failure(custom(server.getsockname()[1]).client().open())
        thread.join()
    assert greetings == [5, 4]
    assert isinstance(reason, Unreachable)
    assert "is it an MQTT broker" in str(reason)


def test_a_server_that_says_nothing_is_given_up(custom, monkeypatch):
    monkeypatch.setattr(mqtt_session, "CONNECT_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        reason = first_failure(custom(server.getsockname()[1]).client().open())
    assert isinstance(reason, Unreachable)
    assert "no answer from" in str(reason)


def test_junk_instead_of_mqtt_does_not_end_the_transport(custom, mosquitto_port):
    """A callback that raises must not leave a dead thread behind a living connection."""
    network = custom(mosquitto_port)
    client = network.client()
    taken = client._take

    def fail_once(event):
        taken(event)
        if isinstance(event, Received) and client.count(Received) == 1:
            raise ZeroDivisionError

    client._take = fail_once
    client.up(None, network.topic("x"))
    sender = network.client().up()
    sender.transport.publish(network.topic("x"), b"1")
    client.wait(lambda: client.count(Connected) == 2, "the new connection")
    assert "ZeroDivisionError" in str(client.failures()[0])


def test_what_greets_a_client_is_no_sign_of_a_useful_link(custom, mosquitto_port):
    """Or a server, which finds a retained state of each device, would hammer a broker that throws it out."""
    network = custom(mosquitto_port)
    sender = network.client().up()
    for number in range(3):
        sender.transport.publish(network.topic(f"retained/{number}"), b"1", retain=True)
    sender.wait(lambda: sender.transport.pending == 0, "all to be taken")
    listener = network.client().up(None, network.topic("retained/+"))
    listener.wait(lambda: len(listener.received()) == 3, "what is retained")
    assert listener.transport._session.carried == 0
    sender.transport.publish(network.topic("retained/0"), b"2")
    listener.wait(lambda: len(listener.received()) == 4, "what is new")
    assert listener.transport._session.carried == 1


def test_threads_end_with_the_transport(custom, mosquitto_port):
    client = custom(mosquitto_port).client().up()
    assert any(thread.name == f"mqtt-{client.name}" for thread in threading.enumerate())
    client.transport.close()
    assert not any(thread.name == f"mqtt-{client.name}" for thread in threading.enumerate())


def test_close_during_the_waiting_between_attempts_returns_at_once(custom, monkeypatch):
    monkeypatch.setattr("lwfed.transport.mqtt.FIRST_DELAY_S", 60.0)
    client = custom(free_port()).client().open()
    client.wait(lambda: client.count(Disconnected) == 1, "a failure")
    client.transport.close()
    assert not any(thread.name == f"mqtt-{client.name}" for thread in threading.enumerate())


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Path:
    """A folder with a certificate for localhost that is its own authority, and its key."""
    tool = shutil.which("openssl")
    if tool is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [tool, "req", "-x509", *kind, *names, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_tls(custom, tmp_path, authority):
    port = free_port()
    files = f"certfile {authority / 'cert.pem'}", f"keyfile {authority / 'key.pem'}", f"cafile {authority / 'cert.pem'}"
    secure = BrokerAddress("127.0.0.1", port, tls=True)
    with mosquitto(tmp_path, port, "allow_anonymous true", "require_certificate true", *files):
        ours = TlsFiles(authority / "cert.pem", authority / "cert.pem", authority / "key.pem")
        client = custom(port, address=secure, tls=ours).client().up()
        client.transport.reconnect()
        client.wait(lambda: client.count(Connected) == 2, "the new connection")

        untrusted = first_failure(custom(port, address=secure).client().open())
        assert isinstance(untrusted, Refused)
        assert "--ca" in str(untrusted)

        plain = first_failure(custom(port).client().open())
        assert isinstance(plain, Unreachable)
        assert "mqtts://" in str(plain)

        without = first_failure(custom(port, address=secure, tls=TlsFiles(authority / "cert.pem")).client().open())
        assert isinstance(without, TransportError)


def test_tls_to_a_port_without_it(custom, mosquitto_port):
    address = BrokerAddress("127.0.0.1", mosquitto_port, tls=True)
    reason = first_failure(custom(mosquitto_port, address=address).client().open())
    assert isinstance(reason, Unreachable)
    assert "TLS" in str(reason)


def test_unusable_files_of_tls_are_an_error_of_the_configuration(custom, tmp_path):
    address = BrokerAddress("127.0.0.1", 1, tls=True)
    with pytest.raises(ConfigError, match=r"none\.pem"):
        custom(1, address=address, tls=TlsFiles(tmp_path / "none.pem")).client()
