"""Labelled images in two halves: one to look among, one to ask about."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lwfed.seeds import derive

Rows = npt.NDArray[np.int64]


def halves(labels: npt.NDArray[np.int64], seed: int) -> tuple[Rows, Rows]:
    """Row numbers of bank and queries: disjoint, sorted, each with half of every class of `labels` [N].

    Of an odd number the bank gets one more. RandomState because numpy promises never to change its streams.
    """
    stream = derive(seed, "halves")
    random = np.random.RandomState([stream & 0xFFFFFFFF, stream >> 32])
    bank: list[Rows] = []
    queries: list[Rows] = []
    for kind in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == kind))
        middle = (len(rows) + 1) // 2
        bank.append(rows[:middle])
        queries.append(rows[middle:])
    return np.sort(np.concatenate(bank)), np.sort(np.concatenate(queries))
