"""Splitting a data set known by name among server and devices: pure, and the same on every machine.

RandomState, not the newer Generator: numpy promises never to change its streams, and server and devices
may run different versions of numpy, while no image may be in two shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lwfed.config.schema import DataSection
from lwfed.errors import DataError
from lwfed.seeds import derive

MAX_DRAWS = 1000

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shares:
    """Row numbers, sorted; disjoint."""

    labelled: Rows
    auxiliary: Rows
    devices: tuple[Rows, ...]


def split(labels: npt.NDArray[np.int64], data: DataSection, seed: int, *, has_test_split: bool = False) -> Shares:
    """Split rows with classes `labels` [N]; with a test split of its own, the set gives nothing for evaluation.

    Raises DataError when the shares of the devices cannot all have `data.min_images`.
    """
    rows = np.arange(len(labels))
    labelled = rows[:0] if has_test_split else _stratified(labels, data.labelled_share, _random(seed, "labelled"))
    rest = _random(seed, "auxiliary").permutation(np.setdiff1d(rows, labelled))
    auxiliary, ours = np.split(rest, [round(data.auxiliary_share * len(labels))])
    if len(ours) < data.devices * data.min_images:
        raise DataError(
            f"{len(ours)} images are too few for data.devices {data.devices} with data.min_images {data.min_images} each: lower one of them"
        )
    parts = _even(ours, data) if data.partition == "even" else _dirichlet(ours, labels, data, seed)
    return Shares(np.sort(labelled), np.sort(auxiliary), tuple(np.sort(part) for part in parts))


def _random(seed: int, *labels: int | str) -> np.random.RandomState:
    stream = derive(seed, "shares", *labels)
    return np.random.RandomState([stream & 0xFFFFFFFF, stream >> 32])


def _stratified(labels: npt.NDArray[np.int64], share: float, random: np.random.RandomState) -> Rows:
    """The same part of every class."""
    taken = []
    for kind in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == kind))
        taken.append(rows[: round(share * len(rows))])
    return np.concatenate(taken)


def _even(rows: Rows, data: DataSection) -> list[Rows]:
    return np.array_split(rows, data.devices)


def _dirichlet(rows: Rows, labels: npt.NDArray[np.int64], data: DataSection, seed: int) -> list[Rows]:
    """Each class is cut in proportions drawn from Dir(beta); drawn anew until no device has too few (Hsu et al., arXiv 1909.06335)."""
    for draw in range(MAX_DRAWS):
        random = _random(seed, "dirichlet", draw)
        parts: list[list[Rows]] = [[] for _ in range(data.devices)]
        for kind in np.unique(labels[rows]):
            members = random.permutation(rows[labels[rows] == kind])
            proportions = random.dirichlet(np.full(data.devices, data.dirichlet_beta))
            cuts = (np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        shares = [np.concatenate(part) for part in parts]
        if min(map(len, shares)) >= data.min_images:
            return shares
    raise DataError(
        f"{MAX_DRAWS} draws gave no Dirichlet split in which all {data.devices} devices have data.min_images {data.min_images}: "
        "raise data.dirichlet_beta, or lower data.devices or data.min_images"
    )
