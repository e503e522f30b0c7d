"""A configuration between programs of different versions: devices and servers are upgraded at different times, and a run outlasts both.

What travels, is stored and gives the digest is one form. What an older program left out of it is as in `base.yaml`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from lwfed.config.explain import explain, unknown
from lwfed.config.parse import base, merge
from lwfed.errors import ConfigError

MAX_NAMED = 10  # keys
Whole = TypeVar("Whole", bound="Travelling")
_STATED = TypeAdapter(dict[str, Any])


class Travelling(BaseModel):
    """The whole of a configuration, of sections."""

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same configuration is the same bytes, so its SHA-256 names it."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls: type[Whole], data: bytes) -> Whole:
        """Read what `to_bytes` wrote, perhaps of another version: keys that it lacks are as in `base.yaml`. Raises ConfigError."""
        try:
            return cls.model_validate(merge(base(), _STATED.validate_json(data)))
        except ValidationError as error:
            raise ConfigError(_explain(error, cls)) from None


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    if not (keys := unknown(error)):
        problems = explain(error, "the server's configuration", model)
        return f"{problems}\nif this lwfed and the server's are of different versions, upgrade the older one"
    named = ", ".join(keys[:MAX_NAMED]) + (f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else "")
    return f"this lwfed does not know {named}, so it is older than the server's: upgrade it (`pip install --upgrade lwfed`)"
