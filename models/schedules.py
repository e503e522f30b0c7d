"""The learning rate of a step. The paper states no schedule for its pre-training; ours is a cosine over the run by default."""

from __future__ import annotations

import math

from lwfed.config.schema import TrainSection
from lwfed.plan import Place

REFERENCE_BATCH = 256  # images; arXiv 2401.11647, section 4.1: lr x batch / 256


def learning_rate(base: float, batch_size: int, train: TrainSection, place: Place, part: float) -> float:
    """The rate when `part` (0 to 1) of the round at `place` is done.

    `base` is the rate (of devices or of calibration) for 256 images, `batch_size` the batch that really is used.
    Raises ValueError when part is outside [0, 1].
    """
    if not 0 <= part <= 1:
        raise ValueError(f"part {part} is not in [0, 1]")
    scaled = base * batch_size / REFERENCE_BATCH if train.lr_scaling == "linear" else base
    per_stage = train.lr_schedule == "cosine_per_stage"
    done, of = (place.stage_round + part, place.stage_rounds) if per_stage else (place.round + part, place.rounds)
    warmup = train.warmup_rounds if train.warmup_rounds < of else 0  # the calibration of a stage is shorter
    if done < warmup:
        return scaled * done / warmup
    progress = min((done - warmup) / (of - warmup), 1.0)
    match train.lr_schedule:
        case "cosine" | "cosine_per_stage":
            return scaled * 0.5 * (1 + math.cos(math.pi * progress))
        case "cyclical":  # triangular (Smith, arXiv 1506.01186), from its peak so that a warm-up leads into it
            cycle = (done - warmup) / train.cycle_rounds % 1
            return scaled * abs(1 - 2 * cycle)
        case "plateau":
            return scaled * place.lr_scale
        case "fixed":
            return scaled
