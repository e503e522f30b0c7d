"""Learning rate over the whole run. The paper states none for its pre-training; ours is a cosine over the run by default."""

from __future__ import annotations

import math
from typing import Literal

REFERENCE_BATCH = 256  # images; arXiv 2401.11647, section 4.1: lr x batch / 256


def learning_rate(base: float, batch_size: int, schedule: Literal["fixed", "cosine"], progress: float) -> float:
    """The rate at `progress`, 0 at the beginning of the run and 1 at its end.

    `base` is the rate for 256 images of the batch; `batch_size` is the batch that really is used.
    Raises ValueError when progress is outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} is not in [0, 1]")
    scaled = base * batch_size / REFERENCE_BATCH
    return scaled if schedule == "fixed" else scaled * 0.5 * (1 + math.cos(math.pi * progress))
