"""What travels as differences, at a device's end: parts made of patches, and updates, whose encoding loses something for the next round.

Without torch, so that a simulated device does it as a real one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from lwfed.config import RunConfig
from lwfed.edge_agent.previous import Previous, Turn, forget
from lwfed.errors import Diverged, InvalidPayload
from lwfed.seeds import derive
from lwfed.wire import deltas, tensors
from lwfed.wire.sizes import Shapes


def patch(config: RunConfig, part: str, shapes: Shapes, base: Path, patches: Iterable[Path], digest: str) -> bytes:
    """The file of `part` that `patches` make of `base`, one after another. Raises InvalidPayload unless its SHA-256 is `digest`."""
    codec = config.transfer.codec
    if codec == "fp32":
        raise InvalidPayload("a run whose codec is fp32 sends no patches")
    found = tensors.decode(base, shapes)
    for file in patches:
        change = deltas.decode(file.read_bytes(), shapes, codec)
        found = {name: tensor + change[name] for name, tensor in found.items()}
    made = tensors.encode(found)
    if hashlib.sha256(made).hexdigest() != digest:
        raise InvalidPayload(f"what was sent of {part} does not make of it what the server announced")
    return made


def encode(
    config: RunConfig,
    turn: Turn,
    update: Mapping[str, tensors.Array],
    received: Mapping[str, tensors.Array],
    kept: Path,
    warn: Callable[[str], object],
) -> bytes:
    """The update as it travels: with the codec fp32 its weights, else differences to what the device received.

    What their encoding loses stays in the folder `kept` for the next round. Raises Diverged where differences cannot be told.
    """
    codec, top_k = config.transfer.codec, config.transfer.top_k
    if codec == "fp32":
        forget("residual", kept)
        return tensors.encode(update)
    residuals = Previous("residual", kept, config, turn)
    missing = residuals.read({name: tensor.shape for name, tensor in update.items()}, warn) or {}
    wanted = {name: tensor - received[name] + missing.get(name, np.float32(0)) for name, tensor in update.items()}
    try:
        encoded = deltas.encode(wanted, codec, top_k, derive(config.run.seed, "update", turn.participant, turn.stage, turn.round))
    except ValueError as error:
        raise Diverged(f"the update cannot be sent: {error}; lower train.lr") from None
    residuals.keep(tensors.encode(encoded.residual))
    return encoded.data
