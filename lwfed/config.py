"""The configuration of a run: validated once, as a whole, and never changed afterwards.

`configs/base.yaml` states every key with its unit and its reason; a preset or a user's file states differences
only. Order, later wins: base, preset or file, ``--set key=value``.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lwfed.errors import ConfigError
from lwfed.plan import CalibrationEvery, CalibrationScope, StagePlan, Strategy, rounds_in_stage, stage_count, stage_plan

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
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
    temperature: Annotated[float, Field(gt=0)]


class StagesSection(Section):
    strategy: Strategy
    layers_per_stage: Positive
    rounds_per_stage: Positive
    layer_init: Literal["random", "copy"]


class TrainSection(Section):
    epochs: Positive
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
    deadline_s: Annotated[float, Field(gt=0)]


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
    linger_s: Annotated[float, Field(ge=0)]
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
                f"rounds.sample {self.rounds.sample} exceeds rounds.min_devices {self.rounds.min_devices}: the first round could not choose so many"
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
            raise ConfigError(_explain(error, "the server's configuration")) from None


def presets() -> list[str]:
    """Names that `load_config` knows without a path."""
    return sorted(entry.name.removesuffix(".yaml") for entry in resources.files("lwfed.configs").iterdir() if entry.name.endswith(".yaml"))


def load_config(name: str, settings: Sequence[str] = ()) -> RunConfig:
    """The configuration of preset or file `name` with ``key=value`` settings on top.

    Raises ConfigError that lists every problem at once, each with the nearest key that exists.
    """
    merged = _parse(resources.files("lwfed.configs").joinpath("base.yaml").read_text("utf-8"), "base.yaml")
    if name != "base":
        merged = _merge(merged, _parse(_read(name), name))
    for setting in settings:
        merged = _merge(merged, _setting(setting))
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, name)) from None


def _read(name: str) -> str:
    known = presets()
    if name in known:
        return resources.files("lwfed.configs").joinpath(f"{name}.yaml").read_text("utf-8")
    path = Path(name)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean the preset {near[0]!r}?" if near else f"presets: {', '.join(known)}; or give the path of a YAML file"
        raise ConfigError(f"configuration {name!r} cannot be read ({getattr(error, 'strerror', None) or error}); {hint}") from None


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where PyYAML silently keeps the last one, and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506, a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name} must be sections of keys, as in base.yaml, not a {type(data).__name__}")
    return data


def _setting(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write it as section.key=value, e.g. --set train.lr=3e-3")
    nested: Any = next(iter(_parse(f"value: {value}", f"--set {text}").values()))
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys of the configuration, e.g. ``train.lr``."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _explain(error: ValidationError, name: str) -> str:
    known = keys()
    lines = [_line(problem, known) for problem in error.errors()]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{name}: {count}\n" + "\n".join(f"  {line}" for line in lines)


def _line(problem: Mapping[str, Any], known: Iterable[str]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{path}: no such key{_nearest(path, list(known))}"
    if problem["type"] == "missing":
        return f"{path}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = "" if isinstance(value, Mapping | BaseModel) else f" (got {value!r})"
    return f"{path}: {message}{shown}" if path else message


def _nearest(path: str, known: list[str]) -> str:
    """The key most like `path`: the same last word in another section counts more than a like spelling."""
    same_word = [key for key in known if key.rpartition(".")[2] == path.rpartition(".")[2]]
    near = same_word[:1] or difflib.get_close_matches(path, known, 1, cutoff=0.5)
    if not near:
        sections = sorted({key.split(".")[0] for key in known})
        near = difflib.get_close_matches(path.split(".")[0], sections, 1)
    return f"; did you mean {near[0]}?" if near else "; configs/base.yaml lists all keys"


# PyYAML follows YAML 1.1, in which 1e-3 is a string; YAML 1.2 and people read a number.
_StrictLoader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
