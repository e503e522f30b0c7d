"""When a loss no longer falls, judged by those of a stage's rounds so far.

A loss falls when it is below every one before it, by however little: the losses of the methods differ in size and sign, so that
no one threshold would do. This is torch.optim.lr_scheduler.ReduceLROnPlateau with patience one less than `rounds` and threshold 0.
"""

from __future__ import annotations

from collections.abc import Iterable


def plateaus(losses: Iterable[float], rounds: int) -> int:
    """How often `rounds` rounds in a row had no lower loss; each such row ends a count and begins the next one."""
    lowest, waited, count = float("inf"), 0, 0
    for loss in losses:
        waited = 0 if loss < lowest else waited + 1
        lowest = min(lowest, loss)
        if waited == rounds:
            waited, count = 0, count + 1
    return count
