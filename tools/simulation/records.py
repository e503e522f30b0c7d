"""What a simulated run cost and achieved, from what its server has stored; and several runs as mean and spread."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from lwfed.cloud_server.course import Course
from lwfed.tools.account import total

Record = dict[str, Any]


def record(course: Course) -> Record:
    """Bytes are the mean of the devices that took part, of MQTT packets as their transports counted them; memory is in MB of 10^6 bytes."""
    config, encoder = course.config, course.encoder_path
    rounds = _rounds(course)
    return {
        "strategy": config.stages.strategy,
        "seed": config.run.seed,
        "folder": str(course.root),
        "stopped": course.state.phase == "stopped",
        "encoder_sha256": hashlib.sha256(encoder.read_bytes()).hexdigest() if encoder.is_file() else None,
        "random": _scores(course, 0, "random"),
        "raw_pixels": _scores(course, 0, "raw_pixels"),
        "stages": [_stage(course, stage, rounds) for stage in sorted({one["stage"] for one in rounds})],
        "rounds": rounds,
    }


def summarise(runs: Sequence[Record]) -> Record:
    """Runs of one strategy that differ in their seeds: each figure as {"mean", "spread"}; spread is the standard deviation, 0 for one.

    Stages are those that all of them have: one that was stopped has fewer.
    """
    stages = [list(found) for found in zip(*(run["stages"] for run in runs), strict=False)]
    return {
        "random": _spread([run["random"] for run in runs]),
        "raw_pixels": _spread([run["raw_pixels"] for run in runs]),
        "stages": [
            {"stage": found[0]["stage"], "collapsed": any(one["collapsed"] for one in found), **(_spread(found) or {})} for found in stages
        ],
        "total": _spread([total(run["stages"]) for run in runs]),
    }


def means(summary: Mapping[str, Any], figure: str = "mean") -> Record:
    """A summary in the form of a single run: `figure` is mean or spread."""

    def of(found: Mapping[str, Any]) -> Record:
        return {name: value[figure] if isinstance(value, dict) else value for name, value in found.items()}

    single: Record = {name: found and of(found) for name, found in summary.items() if name != "stages"}
    return {**single, "stages": [of(one) for one in summary["stages"]]}


def _spread(records: Sequence[Mapping[str, Any] | None]) -> Record | None:
    found = [one for one in records if one is not None]
    if not found:
        return None
    names = [name for name, value in found[0].items() if name != "stage" and (value is None or type(value) in (int, float))]
    return {name: _figure([one[name] for one in found]) for name in names}


def _figure(values: Sequence[float | None]) -> dict[str, float] | None:
    """None where it was not measured."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": mean(known), "spread": stdev(known) if len(known) > 1 else 0.0}


def _scores(course: Course, stage: int, name: str) -> Record | None:
    found = course.store.scores().get((stage, name))
    return asdict(found) if found else None


def _stage(course: Course, stage: int, rounds: Iterable[Record]) -> Record:
    mine = [one for one in rounds if one["stage"] == stage]
    scores, figures = _scores(course, stage, "trained"), course.store.figures(stage)
    judged = {attempt: one for (judged, attempt), one in course.store.judgements().items() if judged == stage}
    assert figures is not None
    return {
        "stage": stage,
        "collapsed": bool(judged) and judged[max(judged)].collapsed,
        "loss": mine[-1]["loss"],
        **(scores or {"knn": None, "probe": None}),
        "features": asdict(judged[max(judged)]) if judged else None,
        **asdict(figures),
        "seconds": round(sum(one["seconds"] for one in mine), 3),
    }


def _rounds(course: Course) -> list[Record]:
    """Seconds are what the training processes of all devices computed, one after the other, and calibration."""
    contributed = course.store.contributed()
    return [
        {
            "stage": row.stage,
            "round": row.round,
            "chosen": len(row.chosen),
            "contributed": contributed[row.stage, row.round].devices,
            "loss": course.store.loss(row.stage, row.round),
            "calibration_loss": row.calibration_loss,
            "seconds": round(contributed[row.stage, row.round].seconds + (row.calibration_seconds or 0.0), 3),
        }
        for row in course.store.rounds()
        if row.closed_s is not None
    ]
