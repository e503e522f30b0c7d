"""Figures of a stage from what its devices reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lwfed.cloud_server.store import Contribution
from lwfed.wire.messages import Traffic


@dataclass(frozen=True)
class StageFigures:
    """Memory is the largest of any device and round; traffic is the mean of the devices that took part."""

    worker_peak_mb: float
    worker_baseline_mb: float
    bytes_down: int
    bytes_up: int


def stage_figures(contributions: Sequence[Contribution], stage: int) -> StageFigures | None:
    """Of `stage`, given the contributions of it and all earlier stages in order; None when it has none."""
    ours = [one for one in contributions if one.stage == stage]
    if not ours:
        return None
    devices = {one.participant for one in ours}
    used = [_used(contributions, participant, stage) for participant in devices]
    return StageFigures(
        worker_peak_mb=max(one.report.memory.peak_mb for one in ours),
        worker_baseline_mb=max(one.report.memory.baseline_mb for one in ours),
        bytes_down=round(sum(traffic.down for traffic in used) / len(used)),
        bytes_up=round(sum(traffic.up for traffic in used) / len(used)),
    )


def _used(contributions: Sequence[Contribution], participant: int, stage: int) -> Traffic:
    """A device's traffic between its last report before the stage and its last one in it; it counts since it joined."""
    before, last = Traffic(down=0, up=0), Traffic(down=0, up=0)
    for one in contributions:
        if one.participant == participant and one.stage < stage:
            before = one.traffic
        elif one.participant == participant and one.stage == stage:
            last = one.traffic
    if last.down < before.down or last.up < before.up:  # its journal was lost: it began to count anew
        return last
    return Traffic(down=last.down - before.down, up=last.up - before.up)
