"""The configuration of a run: validated once, as a whole, and never changed afterwards.

`configs/base.yaml` says what each key means, its unit and its reason.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from lwfed.backbones import CONVOLUTIONAL, known
from lwfed.config.travel import Travelling
from lwfed.plan import (
    HEADS,
    NORM,
    CalibrationScope,
    GraphEngine,
    Place,
    PrefixEngine,
    SslMethod,
    StagePlan,
    Strategy,
    layer_counts,
    round_counts,
    stage_plan,
)

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
Whole = Annotated[int, Strict()]  # for which YAML's yes and true are no number
Number = Annotated[float, Strict()]
Share = Annotated[Number, Field(ge=0, le=1)]
MAX_DEVICES = 2000  # of a fleet: each contribution stores the state of all, in 5 ms on 2 cores; rounds of 10,000 would take minutes
MAX_WAIT_S = 1e6  # eleven days: what operating systems can wait for at once
Positive = Annotated[Whole, Field(ge=1)]
Rounds = Annotated[Whole, Field(ge=1, le=10_000)]


def _word(value: Any) -> Any:
    """YAML 1.1 reads a bare off as false."""
    return "off" if value is False else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    name: Identifier
    fleet: Identifier
    seed: Annotated[Whole, Field(ge=0, lt=2**63)]


class ModelSection(Section):
    backbone: Annotated[str, AfterValidator(known)]
    image_size: Annotated[Whole, Field(ge=4, le=1024)]
    patch_size: Positive
    channels: Literal[1, 3]
    width: Annotated[Whole, Field(ge=4, le=4096)]
    depth: Annotated[Whole, Field(ge=1, le=64)]
    heads: Positive
    mlp_ratio: Annotated[Number, Field(gt=0, le=16)]
    pooling: Literal["mean", "token"]

    @model_validator(mode="after")
    def _divides(self) -> ModelSection:
        if traits := CONVOLUTIONAL.get(self.backbone):
            if (self.depth, self.width) != (traits.depth, traits.width):
                given = f"{self.depth} and {self.width}"
                raise ValueError(f"backbone {self.backbone} has depth {traits.depth} and width {traits.width}, not {given}: leave them out")
            return self
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class SslSection(Section):
    method: SslMethod
    hidden_dim: Positive
    output_dim: Positive
    momentum: Annotated[Number, Field(ge=0, lt=1)]
    temperature: Annotated[Number, Field(ge=1e-3)]
    mask_ratio: Annotated[Number, Field(gt=0, lt=1)]
    decoder_width: Annotated[Whole, Field(ge=32, multiple_of=32)]
    decoder_depth: Positive


class StagesSection(Section):
    strategy: Strategy
    layers_per_stage: Positive | tuple[Positive, ...]
    rounds: Rounds
    rounds_per_stage: Rounds | tuple[Rounds, ...] | None
    layer_init: Literal["random", "copy"]
    overlap: Annotated[Whole, Field(ge=0)]
    depth_dropout: Annotated[Number, Field(ge=0, lt=1)]
    advance: Literal["rounds", "plateau"]
    patience: Positive
    on_collapse: Literal["warn", "repeat", "stop"]


class TrainSection(Section):
    epochs: Annotated[Whole, Field(ge=1, le=1000)]  # a report lists the loss of each
    batch_size: Annotated[Whole, Field(ge=2)]
    lr: Annotated[Number, Field(gt=0)]
    lr_scaling: Literal["linear", "none"]
    lr_schedule: Literal["fixed", "cosine", "cosine_per_stage", "cyclical", "plateau"]
    warmup_rounds: Annotated[Number, Field(ge=0)]
    cycle_rounds: Annotated[Number, Field(gt=0)]
    plateau_rounds: Positive
    plateau_factor: Annotated[Number, Field(gt=0, lt=1)]
    weight_decay: Annotated[Number, Field(ge=0)]
    proximal: Annotated[Number, Field(ge=0)]
    prefix: PrefixEngine | Literal["auto"]
    micro_batch: Positive | Literal["auto"] | None
    views_per_round: Positive | Literal["fresh"]
    features_as: Literal["fp16", "int8"]
    features_in: Literal["file", "memory"]
    features_mb: Annotated[Whole, Field(ge=0)]
    precision: Literal["fp32", "bf16"]
    threads: Annotated[Whole, Field(ge=1, le=256)]


class AlignmentSection(Section):
    method: Annotated[Literal["off", "cosine", "moon"], BeforeValidator(_word)]
    alpha: Annotated[Number, Field(gt=0)]
    temperature: Annotated[Number, Field(ge=1e-3)]


class AggregationSection(Section):
    rule: Literal["mean", "l_dawa", "median", "trimmed_mean", "krum", "multi_krum"]
    trim: Annotated[Number, Field(gt=0, lt=0.5)] | None
    byzantine: Positive | None
    clip_norm: Annotated[Number, Field(gt=0)] | Literal["median"] | None

    @model_validator(mode="after")
    def _has_what_its_rule_reads(self) -> AggregationSection:
        for key, rules in {"trim": ("trimmed_mean",), "byzantine": ("krum", "multi_krum")}.items():
            value = getattr(self, key)
            if value is None and self.rule in rules:
                raise ValueError(f"rule {self.rule} needs {key}: set aggregation.{key}")
            if value is not None and self.rule not in rules:
                raise ValueError(f"{key} {value} does nothing under rule {self.rule}: leave it out, or set rule to {' or '.join(rules)}")
        return self


class ViewsSection(Section):
    crop_scale: tuple[Share, Share]
    flip: Share
    jitter: Share
    brightness: Annotated[Number, Field(ge=0, le=1)]
    contrast: Annotated[Number, Field(ge=0, le=1)]
    saturation: Annotated[Number, Field(ge=0, le=1)]
    hue: Annotated[Number, Field(ge=0, le=0.5)]
    grayscale: Share
    blur: tuple[Share, Share]
    blur_sigma: tuple[Annotated[Number, Field(gt=0)], Annotated[Number, Field(gt=0)]]
    solarise: tuple[Share, Share]

    @model_validator(mode="after")
    def _ordered(self) -> ViewsSection:
        for name in ("crop_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} [{low}, {high}] is no range: give a lower bound above 0 first, then the upper one")
        return self


class RoundsSection(Section):
    min_devices: Annotated[Positive, Field(le=MAX_DEVICES)]
    sample: Positive | None
    oversample: Annotated[Number, Field(ge=1, le=10)]
    quorum: Annotated[Number, Field(gt=0, le=1)]
    deadline_s: Annotated[Number, Field(gt=0, le=MAX_WAIT_S)]
    straggler_factor: Annotated[Number, Field(ge=1)] | None

    @model_validator(mode="after")
    def _samples(self) -> RoundsSection:
        if self.oversample > 1 and self.sample is None:
            raise ValueError(
                f"oversample {self.oversample:g} adds to rounds.sample, which is null: all devices are chosen; set it to a number"
            )
        return self


class CalibrationSection(Section):
    every: Literal["round", "stage", "never"] | Positive
    scope: CalibrationScope
    data: str | None
    epochs: Positive
    batch_size: Annotated[Whole, Field(ge=2)]
    lr: Annotated[Number, Field(gt=0)]

    @model_validator(mode="after")
    def _has_images(self) -> CalibrationSection:
        if self.every != "never" and not self.data:
            raise ValueError(f"every: {self.every} needs auxiliary images: set calibration.data to a folder or data set, or every to never")
        return self


class DataSection(Section):
    partition: Literal["even", "dirichlet", "classes", "quantity", "folders"]
    devices: Positive
    dirichlet_beta: Annotated[Number, Field(gt=0)]
    classes_per_device: Positive
    quantity_beta: Annotated[Number, Field(gt=0)]
    auxiliary_share: Share
    labelled_share: Share
    min_images: Annotated[Whole, Field(ge=2)]

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
    codec: Literal["int8", "bf16", "fp32"]
    top_k: Annotated[Number, Field(gt=0, le=1)]
    chunk_bytes: Annotated[Whole, Field(ge=1024, le=1_000_000)]
    window: Annotated[Whole, Field(ge=1, le=64)]
    upload_slots: Annotated[Whole, Field(ge=1, le=1000)]

    @model_validator(mode="after")
    def _top_k_of_differences(self) -> TransferSection:
        if self.codec == "fp32" and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k:g} chooses among differences, and codec fp32 sends none: take int8 or bf16")
        return self


class WorkerSection(Section):
    device: Literal["auto", "cpu", "cuda"]
    linger_s: Annotated[Number, Field(ge=0, le=MAX_WAIT_S)]
    sample_s: Annotated[Number, Field(ge=0.05, le=60)]


class RunConfig(Section, Travelling):
    """One run, as server and devices agree on it: the server sends it, each device obeys it."""

    run: RunSection
    model: ModelSection
    ssl: SslSection
    stages: StagesSection
    train: TrainSection
    alignment: AlignmentSection
    aggregation: AggregationSection
    views: ViewsSection
    rounds: RoundsSection
    calibration: CalibrationSection
    data: DataSection
    evaluation: EvaluationSection
    transfer: TransferSection
    worker: WorkerSection

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        stages, convolutional = self.stages, self.model.backbone in CONVOLUTIONAL
        if isinstance(stages.layers_per_stage, int) and stages.layers_per_stage > self.model.depth:
            raise ValueError(f"stages.layers_per_stage {stages.layers_per_stage} exceeds model.depth {self.model.depth}")
        round_counts(stages.strategy, self.model.depth, stages.layers_per_stage, stages.rounds_per_stage, stages.rounds)
        self._check_lengths()
        if self.ssl.method == "mae" and self.model.image_size == self.model.patch_size:
            raise ValueError(f"ssl.method mae hides some of several patches: lower model.patch_size {self.model.patch_size}")
        if convolutional and self.ssl.method == "mae":
            raise ValueError(f"ssl.method mae hides patches, which model.backbone {self.model.backbone} does not have: use vit")
        if convolutional and isinstance(self.train.micro_batch, int):
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch}: model.backbone {self.model.backbone} trains with the statistics of the "
                "whole batch; leave it out and lower train.batch_size instead"
            )
        if convolutional and (stages.layer_init == "copy" or stages.depth_dropout):
            raise ValueError(f"stages.layer_init copy and stages.depth_dropout need layers of one shape: not {self.model.backbone}")
        self._check_reuse()
        if stages.on_collapse != "warn" and self.evaluation.data is None and self.calibration.every == "never":
            raise ValueError(
                f"stages.on_collapse {stages.on_collapse} needs images on the server to judge a stage by: set evaluation.data, or "
                "calibration.data and calibration.every, or on_collapse to warn"
            )
        if self.rounds.sample is not None and self.rounds.sample > self.rounds.min_devices:
            raise ValueError(
                f"rounds.sample {self.rounds.sample} exceeds rounds.min_devices {self.rounds.min_devices}: "
                "the first round could not choose so many"
            )
        byzantine = self.aggregation.byzantine
        if byzantine and self.rounds.sample is not None and self.rounds.sample < 2 * byzantine + 3:
            raise ValueError(
                f"aggregation.byzantine {byzantine} needs {2 * byzantine + 3} updates in a round, and rounds.sample chooses "
                f"{self.rounds.sample}: raise it or lower byzantine"
            )
        return self

    def _check_lengths(self) -> None:
        counts, train, every = self.round_counts, self.train, self.calibration.every
        if self.stages.overlap >= self.model.depth:
            raise ValueError(f"stages.overlap {self.stages.overlap} is no fewer than the {self.model.depth} layers of the model: lower it")
        if isinstance(every, int) and every > max(counts):
            raise ValueError(f"calibration.every {every} would never come: it counts the rounds of a stage, at most {max(counts)}")
        whole = min(counts) if train.lr_schedule == "cosine_per_stage" else sum(counts)
        if train.warmup_rounds >= whole:
            what = "a stage" if train.lr_schedule == "cosine_per_stage" else "the run"
            raise ValueError(f"train.warmup_rounds {train.warmup_rounds:g} leaves nothing of the {whole} rounds of {what}: lower it")

    def _check_reuse(self) -> None:
        pairs, epochs = self.train.views_per_round, self.train.epochs
        if pairs == "fresh":
            return
        if self.stages.depth_dropout:
            raise ValueError(f"train.views_per_round {pairs} needs a prefix that is the same in all steps: set stages.depth_dropout to 0")
        plans = [(self.plan(stage), rounds) for stage, rounds in enumerate(self.round_counts, 1)]
        least = min((epochs * (1 if plan.prefix_moves else rounds) for plan, rounds in plans if plan.frozen), default=math.inf)
        if pairs >= least:
            raise ValueError(
                f"train.views_per_round {pairs} saves nothing: frozen layers are the same for {least} epochs; lower it, or set it to fresh"
            )

    @property
    def stage_count(self) -> int:
        return len(layer_counts(self.stages.strategy, self.model.depth, self.stages.layers_per_stage))

    @property
    def round_counts(self) -> tuple[int, ...]:
        """R_s of each stage."""
        stages = self.stages
        return round_counts(stages.strategy, self.model.depth, stages.layers_per_stage, stages.rounds_per_stage, stages.rounds)

    def plan(self, stage: int) -> StagePlan:
        traits = CONVOLUTIONAL.get(self.model.backbone)
        return stage_plan(
            self.stages.strategy,
            stage,
            self.model.depth,
            self.stages.layers_per_stage,
            tail=(*(() if traits else (NORM,)), *HEADS[self.ssl.method]),
            adapted=traits.adapted if traits else (),
            overlap=self.stages.overlap,
            scope=self.calibration.scope,
            every=self.calibration.every,
        )

    @property
    def graphs(self) -> tuple[GraphEngine, ...]:
        """The engines of which a device can use a graph in some stage."""
        plans = (self.plan(stage) for stage in range(1, self.stage_count + 1))
        if self.model.backbone in CONVOLUTIONAL or self.worker.device == "cuda" or not any(plan.frozen_layers for plan in plans):
            return ()
        return tuple(engine for engine in get_args(GraphEngine) if self.train.prefix in ("auto", engine))

    def place(self, stage: int, round: int, lr_scale: float = 1.0) -> Place:
        """Where a round (both 1-based) stands in the run."""
        counts = self.round_counts
        before, in_stage = sum(counts[: stage - 1]), counts[stage - 1]
        # A stage that is repeated goes on counting its rounds, and goes through its part of the schedule once more.
        return Place(before + (round - 1) % in_stage, sum(counts), (round - 1) % in_stage, in_stage, lr_scale)
