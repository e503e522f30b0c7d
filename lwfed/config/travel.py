"""A configuration between programs of different versions: devices and servers are upgraded at different times, and a run outlasts both.

What travels, is stored and gives the digest is one form. What an older program left out of it is as in `base.yaml`; what a newer one
added is left out as long as it says nothing new, as `Grown` does in messages.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from lwfed.config.explain import explain, unknown
from lwfed.config.parse import base, merge
from lwfed.errors import ConfigError

LATER: tuple[str, ...] = ()
"""Dotted keys, such as ``train.lr``, that came after version 0.1.0: older programs refuse keys that they do not know.

A key that is added stands here, and in `base.yaml` with a value under which all is computed as before it; that value never changes.
"""

MAX_NAMED = 10  # keys
Sections = dict[str, dict[str, Any]]
Whole = TypeVar("Whole", bound="Travelling")
_STATED = TypeAdapter(dict[str, Any])


class Travelling(BaseModel):
    """The whole of a configuration, of sections."""

    @property
    def stated(self) -> Sections:
        """Section -> key -> value, as JSON has it; without keys of `LATER` that have base's value."""
        silent = {key for key in LATER if attrgetter(key)(self) == attrgetter(key)(_base(type(self)))}
        held: Sections = self.model_dump(mode="json")
        found = {name: {key: value for key, value in keys.items() if f"{name}.{key}" not in silent} for name, keys in held.items()}
        return {name: keys for name, keys in found.items() if keys}

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same configuration is the same bytes, so its SHA-256 names it."""
        return json.dumps(self.stated, sort_keys=True, separators=(",", ":")).encode()

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


@cache
def _base(model: type[Whole]) -> Whole:
    return model.model_validate(base())


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    if not (keys := unknown(error)):
        problems = explain(error, "the server's configuration", model)
        return f"{problems}\nif this lwfed and the server's are of different versions, upgrade the older one"
    named = ", ".join(keys[:MAX_NAMED]) + (f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else "")
    return f"this lwfed does not know {named}, so it is older than the server's: upgrade it (`pip install --upgrade lwfed`)"
