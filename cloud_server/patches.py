"""What a round changes in the model, for devices that have the model of the round before: differences instead of parts.

With `transfer.codec` int8 or bf16 the model after a round is what devices make of these differences, so that both sides go on
from the same bits. What the encoding loses is added to the differences of the next round, within the stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lwfed.blobs import BlobStore
from lwfed.config import TransferSection
from lwfed.errors import Diverged
from lwfed.seeds import derive
from lwfed.wire import deltas, tensors


@dataclass(frozen=True)
class Published:
    """Blobs, by part; those that differ from what devices were told before."""

    parts: dict[str, str]
    patches: dict[str, tuple[str, str]] = field(default_factory=dict)  # (what it applies to, differences)
    residuals: dict[str, str] = field(default_factory=dict)


Parts = Mapping[str, str]  # part -> blob


def publish(transfer: TransferSection, blobs: BlobStore, before: Parts, after: Parts, residuals: Parts, seed: int) -> Published:
    """Make of `after`, part by part, what devices that hold `before` can be told in a few bytes.

    Raises Diverged where they are further apart than any round of updates makes them (`weights.MAX_DIFFERENCE`).
    """
    changed = {part: blob for part, blob in after.items() if before.get(part) != blob}
    if transfer.codec == "fp32":
        return Published(changed)
    found = Published({})
    for part, blob in changed.items():
        old, new = _read(blobs, before[part]), _read(blobs, blob)
        known = part in residuals and blobs.has(residuals[part])  # a disk may have lost it: what it would have added is small
        missing = _read(blobs, residuals[part]) if known else {}
        with np.errstate(over="ignore"):  # what is not finite is found by `encode`
            wanted = {name: new[name] - old[name] + missing.get(name, np.float32(0)) for name in new}
        try:
            change = deltas.encode(wanted, transfer.codec, 1.0, derive(seed, "patch", part))
        except ValueError as error:
            raise Diverged(f"the round cannot be sent to devices: {error}; lower calibration.lr") from None
        found.parts[part] = blobs.put(tensors.encode({name: old[name] + change.sent(name) for name in new})).id
        found.patches[part] = before[part], blobs.put(change.data).id
        found.residuals[part] = blobs.put(tensors.encode(change.residual)).id
    return found


def _read(blobs: BlobStore, id: str) -> dict[str, tensors.Array]:
    return tensors.read(blobs.path(id))
