"""What a stage adds, freezes, trains and sends: the one record that everything else reads.

A model is a list of *parts*, in the order in which data flows through them: ``stem`` (what comes before the layers),
``layer.1`` .. ``layer.S``, ``adapter.k`` (widens what layer k gives where it is narrower than the whole encoder's output),
``norm`` (after pooling), and the heads of the SSL method: ``projector`` (H), ``predictor`` (P) or ``decoder``.
Freezing, aggregation, transfers, byte counts and checkpoints speak of parts.

Source: arXiv 2401.11647, Table 1 and Algorithm 1; layers per stage: Table 3. The stem is trained with L_1;
norm and heads are trained and travel in every stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

Strategy = Literal["layer_wise", "progressive", "end_to_end"]
SslMethod = Literal["moco_v3", "simclr", "byol", "mae"]
GraphEngine = Literal["onnx", "onnx_int8"]  # ONNX Runtime in float32 or int8, which needs a graph of a layer
PrefixEngine = Literal["torch"] | GraphEngine  # what runs frozen layers
CalibrationScope = Literal["model", "active"]
CalibrationEvery = Literal["round", "stage", "never"] | int  # a number: every so many rounds
PerStage = int | Sequence[int]  # the same in every stage, or stage by stage

STEM, NORM, PROJECTOR, PREDICTOR, DECODER = "stem", "norm", "projector", "predictor", "decoder"
HEADS: Mapping[SslMethod, tuple[str, ...]] = {
    "moco_v3": (PROJECTOR, PREDICTOR),
    "simclr": (PROJECTOR,),
    "byol": (PROJECTOR, PREDICTOR),
    "mae": (DECODER,),
}
ORDER = (NORM, PROJECTOR, PREDICTOR, DECODER)  # of what follows the layers
TAIL = (NORM, PROJECTOR, PREDICTOR)
VARIANCE = ".running_var"  # how such tensors' names end
STATISTICS = (".running_mean", VARIANCE)  # of batch norms, which are averaged and not trained
Value = TypeVar("Value")

# Tensors have timm's names; a backbone whose names are of these forms needs nothing here.
_STEM = re.compile(r"(patch_embed|pos_embed|cls_token|conv_stem|conv1|bn1)(\.|$)")
_NUMBERED = re.compile(r"(blocks\.|layer|adapter\.)(\d+)\.")
_TAIL = re.compile(rf"(fc_norm|{'|'.join(ORDER)})\.")


def layer(number: int) -> str:
    """The part that holds layer L_number (1-based, as in the paper)."""
    return f"layer.{number}"


def adapter(number: int) -> str:
    """The part that follows layer L_number while it is the last one."""
    return f"adapter.{number}"


def part_of(tensor_name: str) -> str:
    """The part that a tensor belongs to, by its (timm-compatible) name: ``blocks.0.attn.qkv.weight`` -> ``layer.1``."""
    if _STEM.match(tensor_name):
        return STEM
    if found := _NUMBERED.match(tensor_name):
        kind, number = found[1], int(found[2])
        return adapter(number) if kind == "adapter." else layer(number + (kind == "blocks."))
    if found := _TAIL.match(tensor_name):
        return NORM if found[1] == "fc_norm" else found[1]
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
    def frozen_layers(self) -> tuple[str, ...]:
        return tuple(part for part in self.frozen if part != STEM)

    @property
    def prefix_moves(self) -> bool:
        """Whether calibration changes frozen parts from one round to the next."""
        return not set(self.frozen).isdisjoint(self.downloaded)

    @property
    def present(self) -> tuple[str, ...]:
        """All parts of F_s with its heads: what a device that joins at this stage must hold."""
        return in_model_order({*self.frozen, *self.trained})


def in_model_order(parts: Iterable[str]) -> tuple[str, ...]:
    def place(part: str) -> tuple[int, int]:
        kind, _, number = part.partition(".")
        if number:
            return (1 if kind == "layer" else 2), int(number)
        return (0, 0) if part == STEM else (3, ORDER.index(part))

    return tuple(sorted(parts, key=place))


def layer_counts(strategy: Strategy, depth: int, layers_per_stage: PerStage) -> tuple[int, ...]:
    """Layers that each stage adds; the last takes what is left. An end-to-end run is a single stage.

    Raises ValueError when a list does not add up to `depth`.
    """
    if isinstance(layers_per_stage, int):
        full, rest = divmod(depth, layers_per_stage)
        counts = (layers_per_stage,) * full + ((rest,) if rest else ())
    else:
        counts = tuple(layers_per_stage)
        if sum(counts) != depth or min(counts) < 1:
            raise ValueError(
                f"layers_per_stage {list(counts)} adds {sum(counts)} layers to an encoder of depth {depth}: they must be equal"
            )
    return (depth,) if strategy == "end_to_end" else counts


def round_counts(
    strategy: Strategy, depth: int, layers_per_stage: PerStage, rounds_per_stage: PerStage | None, rounds: int = 0
) -> tuple[int, ...]:
    """R_s of each stage; where none is given, `rounds` are dealt evenly, as in Table 3, the first stages taking what is left.

    An end-to-end run gets as many rounds in its one stage as a staged run has in all (section 4.1).
    Raises ValueError when a list has not one number for each stage, or a stage no round.
    """
    stages = len(layer_counts("layer_wise", depth, layers_per_stage))
    if rounds_per_stage is None:
        if rounds < stages:
            raise ValueError(f"rounds {rounds} cannot be dealt to {stages} stages")
        counts = tuple(rounds // stages + (stage < rounds % stages) for stage in range(stages))
    else:
        counts = (rounds_per_stage,) * stages if isinstance(rounds_per_stage, int) else tuple(rounds_per_stage)
    if len(counts) != stages:
        raise ValueError(f"rounds_per_stage lists {len(counts)} stages; layers_per_stage makes {stages} of {depth} layers")
    return (sum(counts),) if strategy == "end_to_end" else counts


@dataclass(frozen=True)
class Place:
    """Where in a run a round stands; learning-rate schedules go by it."""

    round: int  # rounds of the run before it, as planned
    rounds: int  # of the whole run
    stage_round: int  # rounds of its stage before it
    stage_rounds: int  # of its stage
    lr_scale: float = 1.0  # what reductions on plateaus have left of the rate


@cache
def stage_plan(
    strategy: Strategy,
    stage: int,
    depth: int,
    layers_per_stage: int | tuple[int, ...] = 1,
    *,
    tail: tuple[str, ...] = TAIL,
    adapted: tuple[int, ...] = (),
    overlap: int = 0,
    scope: CalibrationScope = "model",
    every: CalibrationEvery = "never",
) -> StagePlan:
    """The plan of `stage` (1-based) for an encoder of `depth` layers.

    `tail` is what follows the layers: norm, if any, and heads. Layers in `adapted` get an adapter while they are the last one.
    With `overlap` a layer-wise stage trains so many of the earlier layers once more. Raises ValueError when the strategy has no such stage.
    """
    counts = layer_counts(strategy, depth, layers_per_stage)
    if not 1 <= stage <= len(counts):
        raise ValueError(f"{strategy} over {depth} layers, {layers_per_stage} a stage, has stages 1 to {len(counts)}, not {stage}")
    last = sum(counts[:stage])
    first = last - counts[stage - 1] + 1
    new = {layer(number) for number in range(first, last + 1)} | ({STEM} if stage == 1 else set())
    old = {STEM, *(layer(number) for number in range(1, first))} if stage > 1 else set()
    adapters = {adapter(last)} if last in adapted else set()
    again = {layer(number) for number in range(max(1, first - overlap), first)}
    frozen = old - again if strategy == "layer_wise" else set()
    present = {*old, *new, *adapters, *tail}
    trained = in_model_order(present - frozen)
    calibrated = () if every == "never" else trained if scope == "active" else in_model_order(present)
    moving = calibrated if every == "round" or isinstance(every, int) else ()
    return StagePlan(
        strategy=strategy,
        stage=stage,
        layers=last,
        added=in_model_order({*new, *adapters, *(tail if stage == 1 else ())}),
        frozen=in_model_order(frozen),
        trained=trained,
        uploaded=trained,
        calibrated=calibrated,
        downloaded=in_model_order({*trained, *moving}),
    )
