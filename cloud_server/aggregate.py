"""The weighted mean of a round's updates, tensor by tensor, read from the files in which they arrived.

L_s, H, P <- sum over n of |D_n| / |D| times theirs (arXiv 2401.11647, Algorithm 1). One tensor of one device is in memory
at a time, so the number of devices does not count. Sums are made in the order of participant numbers, in float64:
in whatever order updates arrived, the same updates give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from lwfed.config import RunConfig
from lwfed.models.shapes import part_shapes

Array = npt.NDArray[np.float32]
OPEN_FILES = 64  # each is mapped into memory; more are opened anew for every tensor


@dataclass(frozen=True)
class Share:
    """One device's update. Its content has been checked against the plan."""

    participant: int
    images: int  # |D_n|, its weight
    path: Path


def weighted_mean(shares: Iterable[Share], names: Iterable[str]) -> Iterator[tuple[str, Array]]:
    """The mean of each tensor of `names`, float32; a single update is returned as it is. Raises ValueError without updates."""
    ordered = sorted(shares, key=lambda share: share.participant)
    if not ordered:
        raise ValueError("there is nothing to aggregate")
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for share in ordered[:OPEN_FILES]:
            files[share.path] = stack.enter_context(safe_open(share.path, framework="numpy"))
        for name in names:
            yield name, _mean(ordered, files, name)


def mean_by_part(config: RunConfig, parts: Iterable[str], shares: Iterable[Share]) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """Part by part, the mean of its tensors."""
    ordered = list(shares)
    for part in parts:
        yield part, dict(weighted_mean(ordered, part_shapes(config, part)))


def _mean(shares: list[Share], files: Mapping[Path, Any], name: str) -> Array:
    if len(shares) == 1:
        return _read(shares[0], files, name)
    total = float(sum(share.images for share in shares))
    result: npt.NDArray[np.float64] | None = None
    for share in shares:
        weighted = _read(share, files, name).astype(np.float64) * (share.images / total)
        result = weighted if result is None else np.add(result, weighted, out=result)
    assert result is not None
    return np.asarray(result).astype(np.float32)


def _read(share: Share, files: Mapping[Path, Any], name: str) -> Array:
    if share.path in files:
        return np.asarray(files[share.path].get_tensor(name))
    with safe_open(share.path, framework="numpy") as file:
        return np.asarray(file.get_tensor(name))
