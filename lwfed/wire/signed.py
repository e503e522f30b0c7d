"""Announcements with the server's signature: a broker that leaks, or was taken over, can announce no model.

    JSON \\n signature

The signature is Ed25519 in base64, over the bytes as they travel: it is verified before anything is parsed. It holds for
one fleet, because one server's key may serve several.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

from lwfed.errors import InvalidMessage

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SEPARATOR = b"\n"  # stands in no JSON of ours
CONTEXT = b"lwfed announcement"


def sign(announcement: bytes, fleet: str, key: Ed25519PrivateKey) -> bytes:
    return announcement + SEPARATOR + base64.b64encode(key.sign(_statement(announcement, fleet)))


def verified(payload: bytes, fleet: str, key: bytes) -> bytes:
    """The announcement in `payload`, signed for `fleet` by the owner of the public `key` (32 bytes). Raises InvalidMessage."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    announcement, separator, signature = payload.rpartition(SEPARATOR)
    if not separator:
        raise InvalidMessage("the announcement is not signed")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(base64.b64decode(signature, validate=True), _statement(announcement, fleet))
    except (InvalidSignature, binascii.Error):
        raise InvalidMessage("the announcement is not signed by the server that this device was enrolled with") from None
    return announcement


def unverified(payload: bytes) -> bytes:
    """The announcement in `payload`, signed or not, for whoever has no key to verify it with."""
    return payload.partition(SEPARATOR)[0]


def _statement(announcement: bytes, fleet: str) -> bytes:
    return b"\0".join((CONTEXT, fleet.encode(), announcement))
