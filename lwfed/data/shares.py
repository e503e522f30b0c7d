"""Splitting a data set among server and devices: pure, and the same on every machine.

The server's shares are taken first; `lwfed.data.partitions` deals the rest to the devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lwfed.config.schema import DataSection
from lwfed.data.images import Labels
from lwfed.data.partitions import Random, Rows, deal, stream
from lwfed.errors import DataError


@dataclass(frozen=True)
class Reserve:
    """What the server keeps, and what is left to the devices: row numbers, disjoint; the server's are sorted."""

    labelled: Rows
    auxiliary: Rows
    rest: Rows


@dataclass(frozen=True)
class Shares:
    """Row numbers, sorted; disjoint."""

    labelled: Rows
    auxiliary: Rows
    devices: tuple[Rows, ...]


def reserve(count: int, labels: Labels | None, data: DataSection, seed: int, *, has_test_split: bool) -> Reserve:
    """The server's shares of `count` rows; with a test split of its own or without `labels` [count], none is for evaluation."""
    rows = np.arange(count)
    labelled = rows[:0] if has_test_split or labels is None else _stratified(labels, data.labelled_share, stream(seed, "labelled"))
    rest = stream(seed, "auxiliary").permutation(np.setdiff1d(rows, labelled))
    auxiliary, ours = np.split(rest, [round(data.auxiliary_share * count)])
    return Reserve(np.sort(labelled), np.sort(auxiliary), ours)


def split(count: int, labels: Labels | None, data: DataSection, seed: int, *, has_test_split: bool) -> Shares:
    """Split `count` rows by `data`; a device may get fewer than data.min_images. Raises DataError when all do."""
    kept = reserve(count, labels, data, seed, has_test_split=has_test_split)
    devices = tuple(np.sort(part) for part in deal(kept.rest, labels, data, seed))
    if max(map(len, devices)) < data.min_images:
        raise DataError(
            f"{len(kept.rest)} images are too few for data.devices {data.devices}: no share has data.min_images {data.min_images}; "
            "lower one of them"
        )
    return Shares(kept.labelled, kept.auxiliary, devices)


def _stratified(labels: Labels, share: float, random: Random) -> Rows:
    """The same part of every class."""
    taken = []
    for kind in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == kind))
        taken.append(rows[: round(share * len(rows))])
    return np.concatenate(taken)
