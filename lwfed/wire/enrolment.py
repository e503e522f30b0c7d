"""The two messages by which a device that has a token gets its certificate."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from lwfed.wire.messages import Message
from lwfed.wire.records import Name, Text

Secret = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]  # 32 random bytes in base64url
Pem = Annotated[str, Field(max_length=4096)]


class Enrol(Message):
    """Device: certify my key."""

    secret: Annotated[Secret, Field(repr=False)]  # of the token
    request: Pem  # a certificate signing request for a key of P-256


class Admission(Message):
    """The server: what it certified, or why it does not."""

    device: Name | None = None
    certificate: Pem | None = None
    refused: Text | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Admission:
        if (self.device is None) != (self.certificate is None) or (self.device is None) == (self.refused is None):
            raise ValueError("neither a device with its certificate nor a reason")
        return self
