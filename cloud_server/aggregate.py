"""A round's updates made one model, tensor by tensor, read from the files in which they arrived.

One tensor of one device is in memory at a time, so the number of devices does not count. Sums are made in the order of
participant numbers, in float64: in whatever order updates arrived, the same updates give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Array = npt.NDArray[np.float32]
Weighted = tuple[float, Array]  # |D_n| / |D|, and the tensor of device n
Rule = Callable[[Array, Iterable[Weighted]], Array]  # (the tensor that the devices received, theirs in order) -> the next one

OPEN_FILES = 64  # each is mapped into memory; more are opened anew for every tensor
STATISTICS = (".running_mean", ".running_var")  # of batch norms: estimates of moments, whatever the rule for weights


def mean(previous: Array, shares: Iterable[Weighted]) -> Array:
    """Sum over n of |D_n| / |D| times theirs (arXiv 2401.11647, Algorithm 1); a single update is returned as it is."""
    return _sum(shares)


def l_dawa(previous: Array, shares: Iterable[Weighted]) -> Array:
    """L-DAWA (Rehman et al., ICCV 2023, arXiv 2307.07393): each tensor w_n counts by its angle to the previous global one, w.

        w' = sum over n of |D_n| / |D| * delta_n * w_n,    delta_n = <w_n, w> / (|w_n| |w|)

    taken layer by layer in the paper, tensor by tensor in its code and here. The coefficients are not made to add up to one
    again: what points elsewhere shrinks the layer, and beyond a right angle counts with its sign turned. The paper's code weighs
    all clients alike; here |D_n| does, as with `mean`. Where a tensor is all zeros there is no angle, and delta_n is 1.
    """
    before = previous.astype(np.float64)
    return _sum((weight * _cosine(tensor.astype(np.float64), before), tensor) for weight, tensor in shares)


RULES: Mapping[str, Rule] = {"mean": mean, "l_dawa": l_dawa}


@dataclass(frozen=True)
class Share:
    """One device's update. Its content has been checked against the plan."""

    participant: int
    images: int  # |D_n|, its weight
    path: Path


def aggregate(rule: Rule, previous: Mapping[str, Path], shares: Iterable[Share]) -> Iterator[tuple[str, dict[str, Array]]]:
    """Part by part, its tensors after the round. `previous` are the files of the parts that the devices received.

    Running statistics of batch norms are averaged by images under every rule. Raises ValueError without updates.
    """
    ordered = sorted(shares, key=lambda share: share.participant)
    if not ordered:
        raise ValueError("there is nothing to aggregate")
    total = float(sum(share.images for share in ordered))
    with ExitStack() as stack:
        opened = {share.path: stack.enter_context(safe_open(share.path, framework="numpy")) for share in ordered[:OPEN_FILES]}
        for part, path in previous.items():
            with safe_open(path, framework="numpy") as before:
                found = {}
                for name in before.keys():  # noqa: SIM118, no mapping
                    chosen = mean if name.endswith(STATISTICS) else rule
                    weighted = ((share.images / total, _read(share, opened, name)) for share in ordered)
                    found[name] = chosen(before.get_tensor(name), weighted)
            yield part, found


def _sum(terms: Iterable[Weighted]) -> Array:
    result: npt.NDArray[np.float64] | None = None
    for factor, tensor in terms:
        term = tensor.astype(np.float64) * factor
        result = term if result is None else np.add(result, term, out=result)
    assert result is not None
    return np.asarray(result).astype(np.float32)


def _cosine(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """In [-1, 1]; 1 where one of them is zero. Summed by numpy and not by BLAS, whose sums depend on its threads."""
    lengths = np.sqrt(np.sum(one * one)) * np.sqrt(np.sum(other * other))
    return float(np.clip(np.sum(one * other) / lengths, -1.0, 1.0)) if lengths > 0 else 1.0


def _read(share: Share, opened: Mapping[Path, Any], name: str) -> Array:
    if share.path in opened:
        return np.asarray(opened[share.path].get_tensor(name))
    with safe_open(share.path, framework="numpy") as file:
        return np.asarray(file.get_tensor(name))
