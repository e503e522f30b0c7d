"""What a run cost and achieved, from the events that its server said. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Event = Mapping[str, Any]
FIGURES = ("knn", "probe", "worker_peak_mb", "worker_baseline_mb", "bytes_down", "bytes_up", "seconds")


def baseline(events: Iterable[Event], name: str) -> dict[str, float]:
    """kNN and probe accuracy of `random` weights or `raw_pixels`."""
    found = next(event for event in events if event["event"] == "evaluation" and event["name"] == name)
    return {"knn": found["knn"], "probe": found["probe"]}


def stages(events: Iterable[Event]) -> list[dict[str, Any]]:
    """One record a stage: accuracy after it, memory of the worker that needed most, bytes and seconds.

    Bytes are the mean of the devices. Memory is in MB of 10^6 bytes.
    """
    ended = (event for event in events if event["event"] == "stage" and event["status"] == "ended")
    return [{"stage": event["stage"], **{name: event[name] for name in FIGURES}} for event in ended]


def total(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A run in one record: accuracy of the last stage, largest memory, sums of bytes and seconds."""
    all_ = list(records)
    largest = max(all_, key=lambda record: record["worker_peak_mb"])
    return {
        "knn": all_[-1]["knn"],
        "probe": all_[-1]["probe"],
        "worker_peak_mb": largest["worker_peak_mb"],
        "worker_baseline_mb": largest["worker_baseline_mb"],
        **{name: sum(record[name] for record in all_) for name in ("bytes_down", "bytes_up", "seconds")},
    }


def training_mb(record: Mapping[str, Any]) -> float:
    """What training itself took of the worker's peak."""
    return float(record["worker_peak_mb"] - record["worker_baseline_mb"])
