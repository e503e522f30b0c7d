"""Figures of rounds and stages from what devices reported: one query each over light columns, never over whole reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Float, Select, cast, func, select

from lwfed.cloud_server.store.schema import contributions


@dataclass(frozen=True)
class StageFigures:
    """Memory is the largest of any device and round; traffic is the mean of the devices that have taken part in the run so far."""

    worker_peak_mb: float
    worker_baseline_mb: float
    bytes_down: int
    bytes_up: int


def mean_loss(connection: Connection, run: str, stage: int, round: int) -> float | None:
    """Of the last local epochs of a round, mean by images; None before the first contribution."""
    table = contributions.c
    images = cast(table.images, Float)  # sums of what devices say: of whole numbers SQLite makes none beyond 64 bits
    mean = func.sum(images * table.loss) / func.sum(images)
    found = connection.execute(select(mean).where(table.run == run, table.stage == stage, table.round == round)).scalar()
    return None if found is None else float(found)


@dataclass(frozen=True)
class Contributed:
    devices: int
    seconds: float


def contributed(connection: Connection, run: str) -> dict[tuple[int, int], Contributed]:
    """(stage, round) -> by how many devices, and the seconds that they computed, added up."""
    place = contributions.c.stage, contributions.c.round
    wanted = select(*place, func.count(), func.sum(contributions.c.seconds)).where(contributions.c.run == run)
    rows = connection.execute(wanted.group_by(*place))
    return {(row[0], row[1]): Contributed(row[2], row[3]) for row in rows}


def stage_figures(connection: Connection, run: str, stage: int) -> StageFigures | None:
    """None when nobody has contributed to `stage`."""
    # Of all stages: a device that trained in other stages has cost nothing in this one, and means add up to the run's.
    everybody = select(func.count(contributions.c.participant.distinct())).where(contributions.c.run == run)
    return figures_of(connection.execute(_last_reports(run, stage)).all(), connection.execute(everybody).scalar_one())


def figures_of(reports: Sequence[Any], devices: int) -> StageFigures | None:
    """From rows as `_last_reports` selects them, and the number of devices that have contributed to the run."""
    before = {row.participant: row for row in reports if not row.ours}
    ours = [row for row in reports if row.ours]
    if not ours:
        return None
    used = [_used(row, before.get(row.participant)) for row in ours]
    return StageFigures(
        worker_peak_mb=max(row.peak for row in ours),
        worker_baseline_mb=max(row.baseline for row in ours),
        bytes_down=round(sum(down for down, _ in used) / devices),
        bytes_up=round(sum(up for _, up in used) / devices),
    )


def _last_reports(run: str, stage: int) -> Select[Any]:
    """Of each device the last contribution before `stage` and the last one in it (`ours`), with the most memory of either time.

    To be paired by the caller: SQLite would join them in quadratic time.
    """
    table, ours = contributions.c, contributions.c.stage == stage
    each = (table.participant, ours)
    place = func.row_number().over(partition_by=each, order_by=(table.stage.desc(), table.round.desc()))
    peak, baseline = (func.max(column).over(partition_by=each) for column in (table.peak_mb, table.baseline_mb))
    columns = (ours.label("ours"), place.label("place"), peak.label("peak"), baseline.label("baseline"))
    before = table.run == run, table.stage <= stage
    ranked = select(table.participant, table.down_bytes, table.up_bytes, *columns).where(*before).subquery()
    return select(ranked).where(ranked.c.place == 1)


def _used(last: Any, before: Any | None) -> tuple[int, int]:
    """A device's traffic (down, up) in a stage; its counters run since it joined."""
    down, up = (before.down_bytes, before.up_bytes) if before else (0, 0)
    if last.down_bytes < down or last.up_bytes < up:  # its journal was lost: it began to count anew
        return last.down_bytes, last.up_bytes
    return last.down_bytes - down, last.up_bytes - up
