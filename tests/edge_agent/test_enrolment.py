"""Which identity a device takes when. How it gets one is tested with the server, in tests/system/test_gate.py."""

from pathlib import Path

import pytest

from lwfed.cli import Connection
from lwfed.cloud_server.authority import Authority
from lwfed.edge_agent.agent import JOURNAL
from lwfed.edge_agent.enrolment import enrol, signing_request
from lwfed.edge_agent.identity import Identity, find_access
from lwfed.edge_agent.journal import Journal
from lwfed.errors import ConfigError, StateError
from lwfed.transport.address import BrokerAddress
from lwfed.wire.token import Header, Token

TOKEN = Token(Header(host="localhost", port=1, fleet="default", device="porch", id="t1", secret="s" * 43), b"no certificate")


@pytest.fixture
def state(tmp_path):
    """Of a device that is enrolled."""
    (tmp_path / "identity").mkdir()
    identity = Identity(device="porch", fleet="garden", broker="mqtts://garden.local:8883")
    (tmp_path / "identity" / "identity.json").write_text(identity.model_dump_json())
    return tmp_path


def test_an_enrolled_device_knows_its_way(state):
    access = find_access(None, Connection(), state)
    assert (access.address, access.fleet, access.device) == (BrokerAddress("garden.local", 8883, tls=True), "garden", "porch")
    assert {access.connection.ca, access.connection.cert, access.connection.key} == {
        state / "identity" / f"{name}.pem" for name in ("authority", "certificate", "key")
    }


def test_it_finds_its_server_at_another_address_too(state):
    access = find_access("mqtts://garden.lan:9000", Connection(), state)
    assert (access.address.host, access.device) == ("garden.lan", "porch")


@pytest.mark.parametrize("connection", [Connection(), Connection(insecure=True)])
def test_it_believes_its_server_alone_without_tls_too_and_shows_no_certificate(state, connection):
    access = find_access("mqtt://garden.lan", connection, state)
    assert (access.connection, access.fleet, access.device) == (connection, "garden", "porch")


@pytest.mark.parametrize(
    ("url", "connection"),
    [
        ("mqtts://other", Connection(username="me")),
        ("mqtt://me@other", Connection(insecure=True)),
        ("mqtts://other", Connection(ca=Path("ca.pem"))),
    ],
)
def test_its_identity_goes_to_no_other_broker(state, url, connection):
    access = find_access(url, connection, state)
    assert (access.connection, access.fleet, access.device) == (connection, "default", None)


def test_a_damaged_identity_is_explained(state):
    (state / "identity" / "identity.json").write_text("{")
    with pytest.raises(StateError, match="under another name"):
        find_access(None, Connection(), state)


def test_a_device_that_joined_under_a_name_of_its_own_keeps_it(tmp_path):
    Journal(tmp_path / JOURNAL).close()
    with pytest.raises(StateError, match="joined without enrolment"):
        enrol(TOKEN, tmp_path, 1)
    with pytest.raises(StateError, match="not of porch"):
        Journal(tmp_path / JOURNAL, device="porch")


def test_an_enrolled_device_is_called_by_its_name_for_ever(tmp_path):
    for _ in range(2):
        journal = Journal(tmp_path / JOURNAL, device="porch")
        assert journal.device == "porch"
        journal.close()


def test_a_token_without_a_certificate_is_refused_before_a_key_is_made(tmp_path):
    with pytest.raises(ConfigError, match="holds no certificate"):
        enrol(TOKEN, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("offset", "value"), [(4, 7), (7, 0x80)], ids=["version", "negative serial number"])
def test_a_certificate_that_breaks_the_rules_is_none(tmp_path, offset, value):
    authority = bytearray(Authority(tmp_path).der)
    authority[authority.index(b"\xa0\x03\x02\x01\x02\x02") + offset] = value
    with pytest.raises(ConfigError, match="holds no certificate"):
        signing_request(Token(TOKEN.header, bytes(authority)), tmp_path / "identity")
