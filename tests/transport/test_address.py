from __future__ import annotations

import pytest

from lwfed.errors import ConfigError
from lwfed.transport.address import BrokerAddress, Credentials, TlsFiles, read_credentials


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://host", BrokerAddress("host", 1883)),
        ("mqtts://host", BrokerAddress("host", 8883, tls=True)),
        ("mqtt://10.0.0.7:1884/", BrokerAddress("10.0.0.7", 1884)),
        (" mqtts://me%40home@host:443 ", BrokerAddress("host", 443, True, "me@home")),
        ("mqtt://[::1]:1883", BrokerAddress("::1", 1883)),
    ],
)
def test_addresses(url, address):
    assert BrokerAddress.parse(url) == address
    assert BrokerAddress.parse(str(address)) == BrokerAddress(address.host, address.port, address.tls)


@pytest.mark.parametrize(
    ("host", "local"), [("localhost", True), ("127.0.0.1", True), ("::1", True), ("pi.local", False), ("10.0.0.1", False)]
)
def test_loopback_is_recognised(host, local):
    assert BrokerAddress(host, 1883).loopback is local


@pytest.mark.parametrize("url", ["", "host", "host:1883", "http://host", "mqtt:host", "mqtt://", "mqtt://host/path", "mqtt://host?x=1"])
def test_what_is_no_address_says_how_one_is_written(url):
    with pytest.raises(ConfigError, match=r"write mqtt://\[user@\]host\[:port\]"):
        BrokerAddress.parse(url)


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1"])
def test_ports_are_checked(port):
    with pytest.raises(ConfigError):
        BrokerAddress.parse(f"mqtt://host:{port}")


@pytest.mark.parametrize("url", ["mqtt://me:secret@host", "http://me:secret@host", "mqtt://me:secret@host:x"])
def test_a_password_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        BrokerAddress.parse(url)
    assert "secret" not in str(caught.value)


def test_credentials(tmp_path):
    address = BrokerAddress("host", 1883, username="url")
    (tmp_path / "password").write_text("from file\nsecond line")
    environ = {"LWFED_MQTT_PASSWORD": "from environment"}
    assert read_credentials(address, None, None, {}) == Credentials("url", None)
    assert read_credentials(address, "option", None, environ) == Credentials("option", "from environment")
    assert read_credentials(address, None, tmp_path / "password", environ) == Credentials("url", "from file")
    assert "from" not in repr(read_credentials(address, None, None, environ))


def test_credentials_that_cannot_be(tmp_path):
    address = BrokerAddress("host", 1883)
    with pytest.raises(ConfigError, match="--username"):
        read_credentials(address, None, None, {"LWFED_MQTT_PASSWORD": "x"})
    with pytest.raises(ConfigError, match="none"):
        read_credentials(address, "me", tmp_path / "none", {})


def test_a_key_needs_a_certificate(tmp_path):
    with pytest.raises(ConfigError, match="--cert"):
        TlsFiles(key=tmp_path / "key.pem").context()
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(ConfigError, match=r"junk\.pem"):
        TlsFiles(ca=tmp_path / "junk.pem").context()
