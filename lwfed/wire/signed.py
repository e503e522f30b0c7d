"""Announcements with the server's signature: who can publish in its name at the broker can still announce no model.

    JSON \\n signature

It is that of the server's authority, whose certificate devices have from their token: ECDSA over P-256 with SHA-256, in DER
and base64. The bytes are signed as they travel, so that they are verified before anything is parsed; for one fleet,
because one authority may serve several; and below a word of their own, which no certificate begins with.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

from lwfed.errors import InvalidMessage
from lwfed.wire.messages import MAX_MESSAGE_BYTES

SEPARATOR = b"\n"  # stands in no JSON of ours
CONTEXT = b"lwfed announcement"
SIGNATURE_CHARACTERS = 96  # at most
SIGNATURE_BYTES = len(SEPARATOR) + SIGNATURE_CHARACTERS  # that it adds

NOT_SIGNED = (
    "the announcement is not signed: its server is not that of this device's enrolment (join it with another --state), "
    "or older than this edge-agent, or it is forged"
)

Believe = Callable[[bytes], bytes]  # of a payload the announcement in it; raises InvalidMessage


def signed(announcement: bytes, fleet: str, sign: Callable[[bytes], bytes]) -> bytes:
    """`sign` gives the authority's signature of bytes."""
    return announcement + SEPARATOR + base64.b64encode(sign(_statement(announcement, fleet)))


def unverified(payload: bytes) -> bytes:
    """For devices that were not enrolled and so know no authority."""
    return payload.partition(SEPARATOR)[0]


def verifier(certificate: bytes, fleet: str) -> Believe:
    """For devices that know the authority, by its certificate (PEM). Raises ValueError where that is none."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    key = x509.load_pem_x509_certificate(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("its key is of another kind")

    def verified(payload: bytes) -> bytes:
        announcement, separator, signature = payload[: MAX_MESSAGE_BYTES + SIGNATURE_CHARACTERS + 2].rpartition(SEPARATOR)
        if not separator:
            raise InvalidMessage(NOT_SIGNED)
        try:
            key.verify(base64.b64decode(signature, validate=True), _statement(announcement, fleet), ec.ECDSA(SHA256()))
        except (InvalidSignature, binascii.Error):
            raise InvalidMessage("the announcement is not signed by the server that this device was enrolled with") from None
        return announcement

    return verified


def _statement(announcement: bytes, fleet: str) -> bytes:
    return b"\0".join((CONTEXT, fleet.encode(), announcement))
