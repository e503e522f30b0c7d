"""Which settings say what a run learns. The others say how it proceeds, and may change while it goes on."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

from lwfed.config.explain import keys
from lwfed.config.schema import RunConfig

OPERATION = ("rounds", "transfer", "worker")  # sections that say how a run proceeds
LEARNING = ("transfer.codec", "transfer.top_k")  # keys of such a section that say what is learnt nevertheless


def learns(key: str) -> bool:
    """Whether the dotted `key` says what is learnt."""
    return key.partition(".")[0] not in OPERATION or key in LEARNING


def values(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, as JSON has it."""
    held = config.model_dump(mode="json")
    return {key: held[section][name] for key in keys(RunConfig) for section, _, name in [key.partition(".")]}


@cache
def learning_digest(config: RunConfig) -> str:
    """SHA-256 of the settings that say what is learnt: the same as long as a run goes on."""
    stated = ((f"{section}.{name}", value) for section, held in config.stated.items() for name, value in held.items())
    found = {key: value for key, value in stated if learns(key)}
    return hashlib.sha256(json.dumps(found, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
