"""Krum: which updates of a round lie where most of them lie (Blanchard et al., NeurIPS 2017, arXiv 1703.02757)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lwfed.cloud_server.updates import Share, Updates

Distances = npt.NDArray[np.float64]


def squared_distances(updates: Updates, shares: Sequence[Share]) -> Distances:
    """[N, N] between whole updates, running statistics included: what counted for nothing could be poisoned for nothing.

    Differences are taken before they are squared, so equal updates are at 0; summed by numpy and not by BLAS, as in `l_dawa`.
    """
    found: Distances = np.zeros((len(shares), len(shares)))
    for name, before in updates.tensors(*updates.parts):
        for _, block in updates.blocks(shares, name, before):
            rows = block.reshape(len(shares), -1).astype(np.float64)
            for one in range(len(shares) - 1):
                apart = rows[one + 1 :] - rows[one]
                found[one, one + 1 :] += np.einsum("nd,nd->n", apart, apart)
    return np.asarray(found + found.T)


def select(distances: Distances, byzantine: int, count: int) -> list[int]:
    """Rows of the `count` updates with the least scores; the first of equals. A score: the sum to the N - f - 2 nearest others.

    Raises ValueError unless N >= 2f + 3, where Krum is (alpha, f)-Byzantine resilient.
    """
    total = len(distances)
    if total < 2 * byzantine + 3:
        raise ValueError(f"{total} updates are too few for {byzantine} Byzantine ones")
    others = np.sort(distances + np.diag(np.full(total, np.inf)), axis=1)
    scores = others[:, : total - byzantine - 2].sum(axis=1)
    return sorted(np.argsort(scores, kind="stable")[:count].tolist())
