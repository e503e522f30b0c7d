"""The configuration of a run: validated once, as a whole, and never changed afterwards.

`configs/base.yaml` says what each key means, its unit and its reason.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lwfed.config.explain import explain
from lwfed.errors import ConfigError
from lwfed.plan import CalibrationEvery, CalibrationScope, StagePlan, Strategy, rounds_in_stage, stage_count, stage_plan

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
MAX_WAIT_S = 1e6  # eleven days: what operating systems can wait for at once
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    name: Identifier
    fleet: Identifier
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class ModelSection(Section):
    image_size: Annotated[int, Field(ge=4, le=1024)]
    patch_size: Positive
    channels: Literal[1, 3]
    width: Annotated[int, Field(ge=4, le=4096)]
    depth: Annotated[int, Field(ge=1, le=64)]
    heads: Positive
    mlp_ratio: Annotated[float, Field(gt=0, le=16)]
    pooling: Literal["mean", "token"]

    @model_validator(mode="after")
    def _divides(self) -> ModelSection:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class SslSection(Section):
    method: Literal["moco_v3"]
    hidden_dim: Positive
    output_dim: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    temperature: Annotated[float, Field(ge=1e-3)]


class StagesSection(Section):
    strategy: Strategy
    layers_per_stage: Positive
    rounds_per_stage: Annotated[int, Field(ge=1, le=10_000)]
    layer_init: Literal["random", "copy"]


class TrainSection(Section):
    epochs: Annotated[int, Field(ge=1, le=1000)]  # a report lists the loss of each
    batch_size: Annotated[int, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]
    lr_schedule: Literal["fixed", "cosine"]
    weight_decay: Annotated[float, Field(ge=0)]
    threads: Annotated[int, Field(ge=1, le=256)]


class ViewsSection(Section):
    crop_scale: tuple[Share, Share]
    flip: Share
    jitter: Share
    brightness: Annotated[float, Field(ge=0, le=1)]
    contrast: Annotated[float, Field(ge=0, le=1)]
    saturation: Annotated[float, Field(ge=0, le=1)]
    hue: Annotated[float, Field(ge=0, le=0.5)]
    grayscale: Share
    blur: tuple[Share, Share]
    blur_sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    solarise: tuple[Share, Share]

    @model_validator(mode="after")
    def _ordered(self) -> ViewsSection:
        for name in ("crop_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} [{low}, {high}] is no range: give a lower bound above 0 first, then the upper one")
        return self


class RoundsSection(Section):
    min_devices: Positive
    sample: Positive | None
    quorum: Annotated[float, Field(gt=0, le=1)]
    deadline_s: Annotated[float, Field(gt=0, le=MAX_WAIT_S)]


class CalibrationSection(Section):
    every: CalibrationEvery
    scope: CalibrationScope
    data: str | None
    epochs: Positive
    batch_size: Annotated[int, Field(ge=2)]
    lr: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _has_images(self) -> CalibrationSection:
        if self.every != "never" and not self.data:
            raise ValueError(f"every: {self.every} needs auxiliary images: set calibration.data to a folder or data set, or every to never")
        return self


class DataSection(Section):
    partition: Literal["even", "dirichlet"]
    devices: Positive
    dirichlet_beta: Annotated[float, Field(gt=0)]
    auxiliary_share: Share
    labelled_share: Share
    min_images: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _leaves_images(self) -> DataSection:
        if self.auxiliary_share + self.labelled_share >= 1:
            raise ValueError("auxiliary_share and labelled_share leave nothing to the devices: keep their sum below 1")
        return self


class EvaluationSection(Section):
    data: str | None
    neighbours: Positive
    probe: bool


class TransferSection(Section):
    chunk_bytes: Annotated[int, Field(ge=1024, le=1_000_000)]
    window: Annotated[int, Field(ge=1, le=64)]
    upload_slots: Annotated[int, Field(ge=1, le=1000)]


class WorkerSection(Section):
    linger_s: Annotated[float, Field(ge=0, le=MAX_WAIT_S)]
    sample_s: Annotated[float, Field(ge=0.05, le=60)]


class RunConfig(Section):
    """One run, as server and devices agree on it: the server sends it, each device obeys it."""

    run: RunSection
    model: ModelSection
    ssl: SslSection
    stages: StagesSection
    train: TrainSection
    views: ViewsSection
    rounds: RoundsSection
    calibration: CalibrationSection
    data: DataSection
    evaluation: EvaluationSection
    transfer: TransferSection
    worker: WorkerSection

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        if self.stages.layers_per_stage > self.model.depth:
            raise ValueError(f"stages.layers_per_stage {self.stages.layers_per_stage} exceeds model.depth {self.model.depth}")
        if self.rounds.sample is not None and self.rounds.sample > self.rounds.min_devices:
            raise ValueError(
                f"rounds.sample {self.rounds.sample} exceeds rounds.min_devices {self.rounds.min_devices}: "
                "the first round could not choose so many"
            )
        return self

    @property
    def stage_count(self) -> int:
        return stage_count(self.stages.strategy, self.model.depth, self.stages.layers_per_stage)

    @property
    def rounds_in_stage(self) -> int:
        return rounds_in_stage(self.stages.strategy, self.model.depth, self.stages.layers_per_stage, self.stages.rounds_per_stage)

    def plan(self, stage: int) -> StagePlan:
        return stage_plan(
            self.stages.strategy, stage, self.model.depth, self.stages.layers_per_stage, self.calibration.scope, self.calibration.every
        )

    def share_of_run(self, stage: int, round: int) -> tuple[float, float]:
        """Where a round (both 1-based) begins and ends in the whole run, 0 to 1; learning-rate schedules go by it."""
        rounds, done = self.stage_count * self.rounds_in_stage, (stage - 1) * self.rounds_in_stage + round - 1
        return done / rounds, (done + 1) / rounds

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same configuration is the same bytes, so its SHA-256 names it."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes) -> RunConfig:
        """Read what `to_bytes` wrote; raises ConfigError."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise ConfigError(explain(error, "the server's configuration", cls)) from None
