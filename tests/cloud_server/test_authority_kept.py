"""An authority as version 0.1 left it, on 1 January 2024, goes on for ever: what it has issued holds, and it issues more.

`tests/golden/test-authority` has its files, made for this test alone: `authority.pem` and the registry of the server, the identity
of device porch, and the tokens of porch and of attic, which has not come yet. Shed was revoked.
"""

import shutil
import sqlite3
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from lwfed.cli import Connection
from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.enrolment import admit, invite
from lwfed.cloud_server.registry import FILE_NAME, Contact, Registry, next_epoch
from lwfed.edge_agent.enrolment import signing_request
from lwfed.edge_agent.identity import announcement_verifier, find_access
from lwfed.errors import StateError
from lwfed.transport.address import BrokerAddress
from lwfed.wire.enrolment import Enrol
from lwfed.wire.messages import encode
from lwfed.wire.signed import signed
from lwfed.wire.token import Token

from .test_authority import contexts, handshake

GOLDEN = Path(__file__).parents[1] / "golden" / "test-authority"
THEN_S = 1_704_067_200.0
NO_CHECK_TIME = 0x200000  # of OpenSSL: certificates of then will have expired one day


@pytest.fixture
def folder(tmp_path):
    shutil.copy(GOLDEN / "authority.pem", tmp_path)
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.executescript((GOLDEN / "devices.sql").read_text())
    database.close()
    return tmp_path


@pytest.fixture
def registry(folder):
    made = Registry(folder, lambda: THEN_S)
    yield made
    made.close()


def ask(authority, registry, name, folder):
    """What the device `name` is told that shows the token of then."""
    token = Token.parse((GOLDEN / f"{name}.token").read_text())
    question = Enrol(secret=token.header.secret, request=signing_request(token, folder / name))
    return admit(authority, registry, token.header.id, encode(question), THEN_S)


def test_it_is_taken_up_and_not_founded_anew(folder):
    authority = Authority(folder)
    assert (folder / "authority.pem").read_bytes() == (GOLDEN / "authority.pem").read_bytes()
    assert authority.pem in (GOLDEN / "authority.pem").read_bytes()
    assert authority.pem == (GOLDEN / "porch" / "identity" / "authority.pem").read_bytes()


def test_a_device_of_then_and_a_broker_of_today_shake_hands(folder):
    access = find_access(None, Connection(), GOLDEN / "porch")
    assert (access.address, access.fleet, access.device) == (BrokerAddress("garden.local", 8883, tls=True), "default", "porch")
    authority, files = Authority(folder), access.connection
    assert files.ca.read_bytes() == authority.pem
    pair = contexts(folder, authority, authority.issue(folder, "broker", ("garden.local",)), (files.cert, files.key))
    for side in pair:
        side.verify_flags |= NO_CHECK_TIME
    handshake(*pair, "garden.local")
    with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
        handshake(*pair, "elsewhere")


def test_what_it_issues_today_is_valid_as_long_as_it_is_itself(folder):
    authority = Authority(folder)
    broker, _ = authority.issue(folder, "broker", ("garden.local",))
    ours, leaf = (x509.load_pem_x509_certificate(pem) for pem in (authority.pem, broker.read_bytes()))
    assert (leaf.not_valid_before_utc, leaf.not_valid_after_utc) == (ours.not_valid_before_utc, ours.not_valid_after_utc)


def test_devices_of_then_are_known(registry):
    assert registry.contact == Contact("garden.local", 8883, "default")
    known = {one.name: one for one in registry.devices()}
    assert [(name, one.admitted, one.may_enrol(THEN_S)) for name, one in known.items()] == [
        ("attic", False, True), ("porch", True, False), ("shed", False, False),
    ]  # fmt: skip
    assert (known["porch"].joined_s, known["porch"].user, known["shed"].revoked_s) == (THEN_S, "porch", THEN_S)
    assert known["porch"].certificate == (GOLDEN / "porch" / "identity" / "certificate.pem").read_text()


def test_starts_are_counted_from_now_on(folder, registry):
    assert next_epoch(folder) == 1
    registry.claim(1_800_000_000)
    assert next_epoch(folder) == 1_800_000_001


def test_a_device_of_then_believes_what_it_signs(folder):
    believe = announcement_verifier(GOLDEN / "porch", "default")
    assert believe(signed(b"announcement", "default", Authority(folder).sign)) == b"announcement"
    assert believe((GOLDEN / "announcement.signed").read_bytes()) == b'{"v":1}'


def test_a_token_of_then_still_admits_its_device_and_a_used_one_nobody(folder, registry):
    authority = Authority(folder)
    admission = ask(authority, registry, "attic", folder)
    certificate = x509.load_pem_x509_certificate(admission.certificate.encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.pem))
    assert (admission.device, certificate.subject.rfc4514_string()) == ("attic", "CN=attic")
    assert registry.device("attic").admitted
    assert "used already" in ask(authority, registry, "porch", folder).refused


def test_names_of_then_are_kept_and_others_given_away(folder, registry):
    authority = Authority(folder)
    for name, problem in (("shed", "was revoked"), ("porch", "is enrolled")):
        with pytest.raises(StateError, match=problem):
            invite(authority, registry, name)
    assert invite(authority, registry, "cellar").authority == authority.der
    registry.revoke("porch")
    assert not registry.device("porch").admitted
