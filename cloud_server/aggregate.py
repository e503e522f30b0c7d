"""A round's updates made one model, tensor by tensor, in three steps: clip, choose who counts, combine.

Nothing grows with model times devices: sums have one tensor of one device in memory at a time, what compares devices a block
of bounded size of all of them. Everything is done in the order of participant numbers and summed in float64: in whatever order
updates arrived, the same updates give the same bits.

`mean` and `l_dawa` weigh devices by the images that they say they have. The robust rules do not: the number is a claim, and
the largest would win. Running statistics of batch norms are part of an update: they are clipped and compared with the rest of
it and combined as the rest is, but for `l_dawa`, which averages them by images: estimates of moments have no direction.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lwfed.cloud_server.krum import select, squared_distances
from lwfed.cloud_server.updates import Array, Share, Updates
from lwfed.config import AggregationSection
from lwfed.plan import STATISTICS

Weighted = tuple[float, Array]  # |D_n| / |D|, and the tensor of device n
Sum = Callable[[Array, Iterable[Weighted]], Array]  # (the tensor that the devices received, theirs in order) -> the next one
Fallback = Literal["median", "received"]


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


def median(stack: Array) -> Array:
    """Coordinate-wise (Yin et al., ICML 2018, arXiv 1803.01498, Definition 1); of an even number, the mean of the two in the middle."""
    return _without_ends(stack, (len(stack) - 1) // 2)


def trimmed_mean(stack: Array, trim: float) -> Array:
    """Coordinate-wise, without the part `trim` of the numbers at each end (Yin et al., arXiv 1803.01498, Definition 2).

    What is cut is rounded up, as far as something is left: a round that lost a device must not lose its protection with it.
    """
    return _without_ends(stack, min(math.ceil(trim * len(stack) - 1e-9), (len(stack) - 1) // 2))


SUMS: Mapping[str, Sum] = {"mean": mean, "l_dawa": l_dawa}


@dataclass(frozen=True)
class Screened:
    """Whose updates count in a round, and how."""

    shares: tuple[Share, ...]  # none: the model stays what the devices received
    clipped: dict[int, float] = field(default_factory=dict)  # participant -> what is left of its delta
    left_out: tuple[int, ...] = ()  # participants
    fallback: Fallback | None = None  # what is taken instead of Krum, which has too few updates in this round


def screen(settings: AggregationSection, updates: Updates) -> Screened:
    """Clip, then select, as the settings say.

    With fewer updates than the 2f + 3 of Krum the median takes its place, as long as it has an honest majority, so more than
    2f updates. With fewer still nobody can tell the honest ones, and the round changes nothing.
    """
    shares = updates.shares if settings.clip_norm is None else _clip(updates, settings.clip_norm)
    clipped = {share.participant: share.scale for share in shares if share.scale < 1}
    if settings.byzantine is None:
        return Screened(shares, clipped)
    if len(shares) <= 2 * settings.byzantine:
        return Screened((), clipped, tuple(share.participant for share in shares), "received")
    if len(shares) < 2 * settings.byzantine + 3:
        return Screened(shares, clipped, (), "median")
    # The paper leaves open how many multi-Krum averages: here as many as a score looks at.
    count = 1 if settings.rule == "krum" else len(shares) - settings.byzantine - 2
    chosen = [shares[row] for row in select(squared_distances(updates, shares), settings.byzantine, count)]
    return Screened(tuple(chosen), clipped, tuple(share.participant for share in shares if share not in chosen))


def combine(settings: AggregationSection, screened: Screened, updates: Updates) -> Iterator[tuple[str, dict[str, Array]]]:
    """Part by part, its tensors after the round."""
    for part in updates.parts:
        yield part, {name: _combined(settings, screened, updates, name, before) for name, before in updates.tensors(part)}


def _combined(settings: AggregationSection, screened: Screened, updates: Updates, name: str, before: Array) -> Array:
    shares = screened.shares
    if not shares:
        return before
    rule = screened.fallback or settings.rule
    if rule in ("median", "trimmed_mean"):
        result = np.empty_like(before)
        for index, block in updates.blocks(shares, name, before):
            result[index] = median(block) if settings.trim is None else trimmed_mean(block, settings.trim)
        return result
    images = [share.images if rule in SUMS else 1 for share in shares]
    total = sum(images)
    weighted = ((count / total, updates.read(share, name, before)) for count, share in zip(images, shares, strict=True))
    return mean(before, weighted) if name.endswith(STATISTICS) else SUMS.get(rule, mean)(before, weighted)


def _clip(updates: Updates, bound: float | Literal["median"]) -> tuple[Share, ...]:
    """Deltas scaled down to an L2 norm of at most `bound`, of the whole update (Sun et al., arXiv 1911.07963).

    `median`: to that of the round's norms (FLAME, Nguyen et al., USENIX Security 2022, arXiv 2101.02281, adaptive clipping); of
    an even number the lower one in the middle, so that one of two devices cannot raise it.
    """
    squares = dict.fromkeys(updates.shares, 0.0)
    for name, before in updates.tensors(*updates.parts):
        for share in updates.shares:
            delta = updates.read(share, name, before) - before.astype(np.float64)
            squares[share] += float(np.sum(delta * delta))
    norms = {share: math.sqrt(square) for share, square in squares.items()}
    limit = statistics.median_low(norms.values()) if bound == "median" else bound
    return tuple(replace(share, scale=limit / norm) if norm > limit else share for share, norm in norms.items())


def _without_ends(stack: Array, count: int) -> Array:
    """The mean over all devices but the `count` with the least numbers and the `count` with the greatest, number by number."""
    inner = np.sort(stack, axis=0)[count : len(stack) - count]
    return np.asarray(np.mean(inner, axis=0, dtype=np.float64), np.float32)


def _sum(terms: Iterable[Weighted]) -> Array:
    result: npt.NDArray[np.float64] | None = None
    for factor, tensor in terms:
        term = np.asarray(tensor.astype(np.float64) * factor)  # of a tensor without dimensions numpy makes a number
        result = term if result is None else np.add(result, term, out=result)
    assert result is not None
    return np.asarray(result).astype(np.float32)


def _cosine(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """In [-1, 1]; 1 where one of them is zero. Summed by numpy and not by BLAS, whose sums depend on its threads."""
    lengths = np.sqrt(np.sum(one * one)) * np.sqrt(np.sum(other * other))
    return float(np.clip(np.sum(one * other) / lengths, -1.0, 1.0)) if lengths > 0 else 1.0
