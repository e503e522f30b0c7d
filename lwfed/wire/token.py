"""The token that lets one device enrol, as one line of text: ``lwfed1.HEADER.CERTIFICATE.CHECK``.

The header is JSON and the certificate the authority's own in DER, both in base64url; the check tells a token that was
not copied whole. A hash of the certificate would be shorter, but then the first handshake could not be verified by
ordinary means: the device has nothing yet to verify the other side with.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, ValidationError

from lwfed.errors import ConfigError
from lwfed.wire.enrolment import Secret
from lwfed.wire.records import Name, Record

PREFIX = "lwfed1"
MAX_CHARACTERS = 8192


class Header(Record):
    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Annotated[int, Field(ge=1, lt=65535)]  # for enrolled devices; enrolment has the next one
    fleet: Name
    device: Name
    id: Name
    secret: Annotated[Secret, Field(repr=False)]


@dataclass(frozen=True)
class Token:
    header: Header
    authority: bytes = field(repr=False)  # DER

    def __str__(self) -> str:
        text = ".".join((PREFIX, _encode(self.header.model_dump_json().encode()), _encode(self.authority)))
        return f"{text}.{_check(text)}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises ConfigError, which does not repeat the text: it is a secret."""
        try:
            whole, _, check = text.strip()[:MAX_CHARACTERS].rpartition(".")
            prefix, header, authority = whole.split(".")
            if prefix != PREFIX or check != _check(whole):
                raise ValueError
            return cls(Header.model_validate_json(_decode(header)), _decode(authority))
        except (ValueError, ValidationError):
            raise ConfigError(f"this is no token of `cloud-server enrol`, or not all of it: it begins with {PREFIX}.") from None


def digest(secret: str) -> str:
    """What is stored of a secret, in hex. It is random and long, so a plain hash keeps it; and it is the password at the broker's door."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _check(text: str) -> str:
    return digest(text)[:8]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
