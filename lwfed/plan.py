"""What a stage adds, freezes, trains and sends: the one record that everything else reads.

A model is a list of *parts*, in the order in which data flows through them: ``stem`` (patch projection,
position embedding, class token), ``layer.1`` .. ``layer.S``, ``norm`` (after pooling), ``projector`` (H)
and ``predictor`` (P). Freezing, aggregation, transfers, byte counts and checkpoints speak of parts.

Source: arXiv 2401.11647, Table 1 and Algorithm 1; layers per stage: Table 3. The stem is trained with L_1;
norm and heads are trained and travel in every stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

Strategy = Literal["layer_wise", "progressive", "end_to_end"]
CalibrationScope = Literal["model", "active"]
CalibrationEvery = Literal["round", "stage", "never"]

STEM, NORM, PROJECTOR, PREDICTOR = "stem", "norm", "projector", "predictor"
TAIL = (NORM, PROJECTOR, PREDICTOR)
Value = TypeVar("Value")


def layer(number: int) -> str:
    """The part that holds layer L_number (1-based, as in the paper)."""
    return f"layer.{number}"


def part_of(tensor_name: str) -> str:
    """The part that a tensor belongs to, by its (timm-compatible) name: ``blocks.0.attn.qkv.weight`` -> ``layer.1``."""
    head, _, rest = tensor_name.partition(".")
    if head in ("patch_embed", "pos_embed", "cls_token"):
        return STEM
    if head == "blocks" and rest.split(".")[0].isdecimal():
        return layer(int(rest.split(".")[0]) + 1)
    if head in ("norm", "fc_norm"):
        return NORM
    if head in (PROJECTOR, PREDICTOR):
        return head
    raise ValueError(f"tensor {tensor_name!r} belongs to no part of the model")


def by_part(tensors: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Group tensors by their part, keeping the order of both."""
    parts: dict[str, dict[str, Value]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(part_of(name), {})[name] = tensor
    return parts


@dataclass(frozen=True)
class StagePlan:
    """One stage of one strategy. All fields but the first three are parts in model order."""

    strategy: Strategy
    stage: int  # s, 1-based
    layers: int  # layers that exist in this stage
    added: tuple[str, ...]  # initialised when the stage begins
    frozen: tuple[str, ...]  # bit-identical after a local call
    trained: tuple[str, ...]  # receive gradients on the device
    uploaded: tuple[str, ...]  # sent by the device in every round
    calibrated: tuple[str, ...]  # trained by the server after aggregation, when it calibrates
    downloaded: tuple[str, ...]  # changed by every round, hence sent to the device in every round

    @property
    def present(self) -> tuple[str, ...]:
        """All parts of F_s with its heads: what a device that joins at this stage must hold."""
        return in_model_order({*self.frozen, *self.trained})


def in_model_order(parts: Iterable[str]) -> tuple[str, ...]:
    def place(part: str) -> tuple[int, int]:
        if part.startswith("layer."):
            return 1, int(part.removeprefix("layer."))
        return (0, 0) if part == STEM else (2, TAIL.index(part))

    return tuple(sorted(parts, key=place))


def stage_count(strategy: Strategy, depth: int, layers_per_stage: int) -> int:
    """S: how many stages the run has; an end-to-end run is a single stage."""
    return 1 if strategy == "end_to_end" else -(-depth // layers_per_stage)


def rounds_in_stage(strategy: Strategy, depth: int, layers_per_stage: int, rounds_per_stage: int) -> int:
    """R_s. An end-to-end run gets as many rounds in its one stage as a staged run has in all (section 4.1)."""
    return rounds_per_stage * (-(-depth // layers_per_stage) if strategy == "end_to_end" else 1)


def stage_plan(
    strategy: Strategy,
    stage: int,
    depth: int,
    layers_per_stage: int = 1,
    scope: CalibrationScope = "model",
    every: CalibrationEvery = "never",
) -> StagePlan:
    """The plan of `stage` (1-based) for an encoder of `depth` layers.

    Raises ValueError when the strategy has no such stage.
    """
    stages = stage_count(strategy, depth, layers_per_stage)
    if not 1 <= stage <= stages:
        raise ValueError(f"{strategy} over {depth} layers, {layers_per_stage} a stage, has stages 1 to {stages}, not {stage}")
    if strategy == "end_to_end":
        first, last = 1, depth
    else:
        first, last = (stage - 1) * layers_per_stage + 1, min(stage * layers_per_stage, depth)

    new = [layer(number) for number in range(first, last + 1)]
    old = [STEM, *(layer(number) for number in range(1, first))] if stage > 1 else []
    if stage == 1:
        new.insert(0, STEM)
    frozen = tuple(old) if strategy == "layer_wise" else ()
    trained = in_model_order({*old, *new, *TAIL} - set(frozen))
    calibrated = () if every == "never" else trained if scope == "active" else in_model_order({*old, *new, *TAIL})
    return StagePlan(
        strategy=strategy,
        stage=stage,
        layers=last,
        added=in_model_order({*new, *(TAIL if stage == 1 else ())}),
        frozen=frozen,
        trained=trained,
        uploaded=trained,
        calibrated=calibrated,
        downloaded=in_model_order({*trained, *(calibrated if every == "round" else ())}),
    )
