"""The server's certificates, looked at and used as OpenSSL does."""

import base64
import ssl
import stat
from datetime import datetime, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from lwfed.cloud_server.authority import FILE_NAME, Authority
from lwfed.errors import InvalidPayload, StateError


def request(key=None, subject="anybody"):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    key = key or ec.generate_private_key(ec.SECP256R1())
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


PEM = b"-----BEGIN CERTIFICATE REQUEST-----\n%s-----END CERTIFICATE REQUEST-----\n"


def der_of(pem):
    return x509.load_pem_x509_csr(pem).public_bytes(serialization.Encoding.DER)


def handshake(server, client, host):
    """Whether two contexts of TLS agree, without a socket."""
    toward_client, toward_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        server.wrap_bio(toward_server, toward_client, server_side=True),
        client.wrap_bio(toward_client, toward_server, server_hostname=host),
    ]
    while sides:
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                pass


def contexts(folder, authority, broker, client):
    (folder / "ca.pem").write_bytes(authority.pem)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    server.maximum_version = ssl.TLSVersion.TLSv1_2  # in which a client learns at once that it is refused
    server.load_cert_chain(*broker)
    device = ssl.create_default_context(cafile=folder / "ca.pem")
    device.load_cert_chain(*client)
    return server, device


def test_it_is_founded_once_and_only_its_owner_may_read_it(tmp_path):
    first = Authority(tmp_path)
    again = Authority(tmp_path)
    assert again.der == first.der
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_a_damaged_one_is_not_replaced(tmp_path):
    (tmp_path / FILE_NAME).write_text("-----BEGIN PRIVATE KEY-----\nnone\n-----END PRIVATE KEY-----\n")
    with pytest.raises(StateError, match="put it back from a copy"):
        Authority(tmp_path)


def test_brokers_and_devices_of_one_authority_shake_hands_under_their_names(tmp_path):
    authority = Authority(tmp_path)
    broker = authority.issue(tmp_path, "broker", ("garden.local", "192.0.2.7"))
    client = authority.issue(tmp_path, "lwfed.server")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (*broker, *client)} == {0o600}
    pair = contexts(tmp_path, authority, broker, client)
    for host in ("garden.local", "192.0.2.7"):
        handshake(*pair, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
        handshake(*pair, "elsewhere")


def test_no_device_can_pose_as_the_broker_nor_the_broker_as_a_device(tmp_path):
    authority = Authority(tmp_path)
    broker = authority.issue(tmp_path, "broker", ("localhost",))
    client = authority.issue(tmp_path, "localhost")
    with pytest.raises(ssl.SSLError, match="purpose"):
        handshake(*contexts(tmp_path, authority, client, client), "localhost")
    with pytest.raises(ssl.SSLError, match="purpose"):
        handshake(*contexts(tmp_path, authority, broker, broker), "localhost")


def test_another_authority_is_not_believed(tmp_path):
    (tmp_path / "other").mkdir()
    ours, other = Authority(tmp_path), Authority(tmp_path / "other")
    broker, client = other.issue(tmp_path / "other", "broker", ("localhost",)), ours.issue(tmp_path, "porch")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(*contexts(tmp_path, ours, broker, client), "localhost")


@pytest.mark.parametrize("year", [1970, 2021, 2030], ids=["none", "behind", "ahead"])
def test_what_a_server_without_the_right_time_issues_is_valid_then_and_when_its_clock_was_put_right(tmp_path, year):
    then = datetime(year, 1, 1, 1, tzinfo=timezone.utc)
    authority = Authority(tmp_path, then.timestamp)
    issued = [authority.issue(tmp_path, "broker", ("localhost",))[0].read_bytes(), authority.certify(request(), "porch")]
    for certificate in map(x509.load_pem_x509_certificate, [authority.pem, *issued]):
        for now in (then, datetime(2026, 7, 1, tzinfo=timezone.utc), datetime(2045, 12, 1, tzinfo=timezone.utc)):
            assert certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def test_a_device_gets_the_name_it_was_invited_by_and_no_other_right(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = x509.load_pem_x509_certificate(Authority(tmp_path).certify(request(key, "server"), "porch"))
    assert certificate.subject.rfc4514_string() == "CN=porch"
    assert certificate.public_key() == key.public_key()
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        request(ed25519.Ed25519PrivateKey.generate()),
        request(rsa.generate_private_key(65537, 2048)),
        request(ec.generate_private_key(ec.SECP384R1())),
        PEM % base64.encodebytes(der_of(request()).replace(b"\x02\x01\x00", b"\x02\x01\x02", 1)),
    ],
    ids=["empty", "junk", "ed25519", "rsa", "p384", "of another version"],
)
def test_other_requests_are_refused(tmp_path, bad):
    with pytest.raises(InvalidPayload):
        Authority(tmp_path).certify(bad, "porch")


def test_a_request_that_its_key_did_not_sign_is_refused(tmp_path):
    one, other = (x509.load_pem_x509_csr(request()) for _ in range(2))
    ours, theirs = one.public_bytes(serialization.Encoding.DER), other.public_bytes(serialization.Encoding.DER)
    point = one.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    stolen = other.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    assert theirs.count(stolen) == ours.count(point) == 1
    forged = x509.load_der_x509_csr(ours.replace(point, stolen)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(InvalidPayload, match="signed"):
        Authority(tmp_path).certify(forged, "porch")


@pytest.mark.parametrize("name", ["", "a/b", "lwfed.server", "Porch", "n" * 65])
def test_a_device_cannot_be_called_anything(tmp_path, name):
    with pytest.raises(ValueError, match="no name"):
        Authority(tmp_path).certify(request(), name)
