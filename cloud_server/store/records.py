"""What a store is given and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lwfed.wire.messages import Hello, Offer
from lwfed.wire.report import Report, Traffic


@dataclass(frozen=True)
class Contribution:
    id: str
    stage: int
    round: int
    participant: int
    blob: str
    size: int  # bytes
    report: Report
    traffic: Traffic

    @classmethod
    def of(cls, offer: Offer, traffic: Traffic) -> Contribution:
        blob = offer.manifest.blob
        return cls(offer.contribution, offer.stage, offer.round, offer.participant, blob.id, blob.size, offer.report, traffic)

    @classmethod
    def of_row(cls, row: Any) -> Contribution:
        traffic = Traffic(down=row.down_bytes, up=row.up_bytes)
        report = Report.model_validate(row.report)
        return cls(row.id, row.stage, row.round, row.participant, row.blob, row.bytes, report, traffic)


@dataclass(frozen=True)
class Device:
    participant: int
    id: str
    hello: Hello
    seen_s: float
    doubled_s: float | None  # when two agents last spoke with its identity
    complaints: Mapping[str, int]  # code -> how often, over the run


@dataclass(frozen=True)
class Scores:
    knn: float  # accuracy
    probe: float | None
    metrics: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)  # of kNN and probe: `lwfed.models.evaluation.metrics`

    @classmethod
    def of(cls, knn: Mapping[str, float], probe: Mapping[str, float] | None) -> Scores:
        return cls(knn["accuracy"], probe["accuracy"] if probe else None, {"knn": knn, "probe": probe})


@dataclass(frozen=True)
class Judgement:
    """Of the features of a trained stage."""

    collapsed: bool
    spread: float  # of normalised features, per dimension; 1: in all directions alike
    rank: float  # effective rank
