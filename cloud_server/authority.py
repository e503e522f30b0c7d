"""The certificate authority of a server: it says by signature which device is which, and which broker and model are the server's.

Key and certificate are made once and stay: every version of the server finds them where the first one put them.
Certificates are ECDSA P-256 with SHA-256, which every OpenSSL on a device knows. One of a device is good for clients
only and one of the broker for servers only, so that no device can pose as the broker to another one. All are valid as
long as the authority's, and that from 1970 on: servers and devices are boards that may have no time when they start.
"""

from __future__ import annotations

import datetime
import ipaddress
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lwfed.errors import InvalidPayload, StateError
from lwfed.private import write_private
from lwfed.wire.topics import is_name

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

FILE_NAME = "authority.pem"
SUBJECT = "lwfed authority"
SINCE = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
WRITTEN = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)  # a clock that is behind this program is wrong
LIFETIME = datetime.timedelta(days=20 * 365)  # a device in the field must not fall silent by a date; revocation does not wait for one
DER_SEQUENCE = b"\x30"
MISSING = (
    "put it back from the copy, for enrolled devices believe no other authority; or end the server, delete all of {folder}, "
    "and begin anew: then every device must be enrolled again, with another --state"
)


class Authority:
    def __init__(self, folder: Path, clock: Callable[[], float] = time.time, found: bool = True) -> None:
        """Take up the authority in `folder`; where there is none, `found` it. `clock` gives Unix time. Raises StateError."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

        path = folder / FILE_NAME
        if not path.exists():
            if not found:
                raise StateError(f"{path} is missing: {MISSING.format(folder=folder)}")
            write_private(path, _found(clock()))
        try:
            pem = path.read_bytes()
            key = serialization.load_pem_private_key(pem, None)
            self._certificate = x509.load_pem_x509_certificate(pem)
            if not isinstance(key, EllipticCurvePrivateKey):
                raise ValueError("its key is of another kind")
        except (OSError, ValueError) as error:
            raise StateError(f"cannot read the authority in {path} ({error}): put it back from a copy; a new one knows no device") from None
        self._key = key

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        from cryptography.hazmat.primitives.serialization import Encoding

        return self._certificate.public_bytes(Encoding.PEM)

    @property
    def der(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding

        return self._certificate.public_bytes(Encoding.DER)

    def sign(self, statement: bytes) -> bytes:
        """Its signature (ECDSA with SHA-256, in DER) of what is no certificate: it must not begin as one does."""
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
        from cryptography.hazmat.primitives.hashes import SHA256

        if statement[:1] == DER_SEQUENCE:
            raise ValueError("this could be a certificate")
        return self._key.sign(statement, ECDSA(SHA256()))

    def certify(self, request: bytes, name: str, subject: str | None = None) -> bytes:
        """The certificate (PEM) of device `name` for the key of a signing request (PEM), of which nothing else is used.

        Its subject is the name unless there is another. Raises InvalidPayload for anything but a P-256 key whose owner signed the request.
        """
        from cryptography import x509
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec

        if not is_name(name):
            raise ValueError(f"{name!r} is no name of a device")
        try:
            asked = x509.load_pem_x509_csr(request)
            key, signed = asked.public_key(), asked.is_signature_valid
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
            raise InvalidPayload("this is no certificate signing request") from None
        if not signed or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise InvalidPayload("a certificate signing request must be signed with a key of P-256")
        return self._sign(subject or name, key)

    def issue(self, folder: Path, name: str, hosts: tuple[str, ...] = ()) -> tuple[Path, Path]:
        """Write a new key and its certificate below `folder`: of a broker reached as `hosts`, or of a client without any.

        Returns the files of certificate and key. Raises StateError.
        """
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
        write_private(private, private_pem(key))
        write_private(certificate, self._sign(name, key.public_key(), hosts))
        return certificate, private

    def _sign(self, name: str, key: EllipticCurvePublicKey, hosts: tuple[str, ...] = ()) -> bytes:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

        builder = _begin(name, key, self._certificate.not_valid_before_utc, self._certificate.not_valid_after_utc)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(authority=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([Usage.SERVER_AUTH if hosts else Usage.CLIENT_AUTH]), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


def _found(now_s: float) -> bytes:
    """Key and certificate in one text, so that there is never one without the other."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.fromtimestamp(now_s, datetime.timezone.utc)
    builder = _begin(SUBJECT, key.public_key(), SINCE, max(now, WRITTEN) + LIFETIME)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    return private_pem(key) + certificate.public_bytes(serialization.Encoding.PEM)


def _begin(name: str, key: EllipticCurvePublicKey, since: datetime.datetime, until: datetime.datetime) -> x509.CertificateBuilder:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    def subject(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = x509.CertificateBuilder().subject_name(subject(name)).issuer_name(subject(SUBJECT)).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(since).not_valid_after(until)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
