"""What a run costs a device, by the stage plans and by what `lwfed.models.measure` finds of each part.

Two accounts of computation, both in multiply-accumulates (MACs) for each image of a device, over all local epochs:

* `paper_macs`, as arXiv 2401.11647 counts (Tables 2 and 3): the online branch alone, one view (both for SimCLR), forward 1,
  backward 2 for what is trained, frozen parts forward only, LayerNorm 5 for each number.
* `true_macs`, what `lwfed.models.step` does: all views and the making of them, all branches, the second forward pass of a
  micro-batch, backward passes no further down than something is trained, and the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lwfed.config import RunConfig
from lwfed.models.fitting import CODE_BYTES, piece_size
from lwfed.models.measure import Measured, Part
from lwfed.models.ssl import METHODS
from lwfed.plan import DECODER, PREDICTOR, PROJECTOR, STEM, StagePlan

NORM_MACS = 5  # of LayerNorm, for each number, as fvcore counts
PAPER_GB = 2**20 * 1000  # the paper's GB: 1000 MiB
FURTHER = {"off": 0, "cosine": 1, "moon": 2}  # branches that alignment adds, of one view
BACKWARD = 7  # times the largest tensor that the layers keep, for their backward pass: two gradients, and, fitted, gaps between tensors
WHOLE_BATCH = {PROJECTOR, PREDICTOR}  # heads that need all of a batch at once


@dataclass(frozen=True)
class StageCost:
    """One device in one stage, over all its rounds."""

    strategy: str
    stage: int
    layers: int
    rounds: int
    parameters: int  # of all parts, running statistics included
    trained: int  # of them
    gflops_paper: float  # 10^9 MACs an image
    gflops_true: float
    memory_mb: float  # of the worker, above what it takes before training; an estimate


def stage_cost(config: RunConfig, stage: int, measured: Measured) -> StageCost:
    """Cost of `stage` under the strategy of `config`."""
    plan, rounds = config.plan(stage), config.round_counts[stage - 1]
    epochs = rounds * config.train.epochs
    return StageCost(
        strategy=plan.strategy,
        stage=stage,
        layers=plan.layers,
        rounds=rounds,
        parameters=count(measured, plan.present),
        trained=count(measured, plan.trained),
        gflops_paper=paper_macs(config, plan, measured) * epochs / 1e9,
        gflops_true=true_macs(config, plan, measured) * epochs / 1e9,
        memory_mb=memory_bytes(config, plan, measured) / 1e6,
    )


def count(measured: Measured, parts: Iterable[str]) -> int:
    return sum(measured.parts[part].numbers for part in parts)


def paper_macs(config: RunConfig, plan: StagePlan, measured: Measured) -> float:
    """For one image in one epoch, as the paper counts."""

    def forward(part: str) -> float:
        found = measured.parts[part]
        return found.forward + NORM_MACS * found.normalised

    views = 2 if config.ssl.method == "simclr" else 1
    trained = sum(3 * forward(part) for part in plan.trained)
    return views * (trained + sum(forward(part) * _share(config, part) for part in plan.frozen))


def true_macs(config: RunConfig, plan: StagePlan, measured: Measured) -> float:
    """For one image in one epoch, as `lwfed.models.step` computes it; a first round without moon's previous model costs less."""
    method, parts = METHODS[config.ssl.method], measured.parts
    views, trained = method.view_count, set(plan.trained)
    layers = trained - WHOLE_BATCH  # and a decoder, which sees one sample at a time as they do
    branch = trained - {PREDICTOR, DECODER}
    chunked = piece_size(config, config.train.batch_size, kept_by_layers(plan, measured)) < config.train.batch_size
    online_passes = views * (1 + chunked)
    branch_passes = views * method.has_target + FURTHER[config.alignment.method]

    def forward(wanted: Iterable[str]) -> float:
        return sum(parts[part].forward for part in wanted)

    computed = _computed(config, plan)
    prefix = computed.share * sum(parts[part].forward * _share(config, part) for part in computed.parts)
    backward = sum(parts[part].weights_only if part == plan.trained[0] else parts[part].backward for part in plan.trained)
    once = prefix + forward(trained - layers) + backward
    # Where nothing is frozen every pass makes its views anew; a method that sees pixels needs them beside the prefix's tokens too.
    from_pixels = computed.share * (STEM in computed.parts)
    made = views * from_pixels + method.sees_pixels * online_passes if plan.frozen else online_passes + branch_passes
    passes = online_passes * forward(layers) + branch_passes * forward(branch)
    return views * once + passes + made * measured.view_macs + measured.loss_macs


@dataclass(frozen=True)
class Computed:
    """What of the frozen prefix is computed, and how often for each image and local epoch; see `lwfed.models.reuse`."""

    parts: tuple[str, ...]
    share: float


def _computed(config: RunConfig, plan: StagePlan) -> Computed:
    pairs = config.train.views_per_round
    if pairs == "fresh" or not plan.frozen:
        return Computed(plan.frozen, 1.0)
    rounds = 1 if plan.prefix_moves else config.round_counts[plan.stage - 1]
    moved = config.calibration.every != "never" and config.calibration.scope == "model"
    earlier = () if moved or config.train.features_in == "memory" else config.plan(plan.stage - 1).frozen  # memory ends with its stage
    return Computed(tuple(part for part in plan.frozen if part not in earlier), pairs / (config.train.epochs * rounds))


def memory_bytes(config: RunConfig, plan: StagePlan, measured: Measured) -> float:
    """Peak of a worker's training in float32 on a CPU, above its imports and without the images.

    Code, weights of all branches, gradients, optimiser state, what the prefix gives for all views of a batch; and what the
    backward pass keeps and takes, what a frozen layer holds while it computes, or the copy of the second moments of a step.
    """
    method, parts, batch = METHODS[config.ssl.method], measured.parts, config.train.batch_size
    per_sample = kept_by_layers(plan, measured)
    piece = piece_size(config, batch, per_sample)
    views_at_once = 1 if piece < batch else method.view_count
    per_image = method.view_count * sum(_kept(plan, measured, part) for part in plan.trained if part in WHOLE_BATCH)
    tokens = method.view_count * parts[plan.frozen[-1]].given_bytes if plan.frozen else 0.0
    copies = method.has_target + FURTHER[config.alignment.method]
    branches = copies * count(measured, set(plan.trained) - {PREDICTOR, DECODER})
    weights = 4 * (count(measured, plan.present) + 4 * count(measured, plan.trained) + branches)
    backward = per_image * batch + views_at_once * piece * per_sample + BACKWARD * piece * _widest(parts[part] for part in plan.trained)
    prefix = 3 * piece * _widest(parts[part] for part in plan.frozen)
    step = 4 * count(measured, plan.trained)
    return CODE_BYTES + weights + max(tokens * batch + max(backward, prefix), step)


def paper_bytes(config: RunConfig, measured: Measured, worst: bool = False) -> float:
    """Down and up over the run by the paper's account: float32, heads counted, neither headers nor a first download.

    Calibration of the whole model adds the frozen parts to a round's download, or all of F_s once a stage; where nothing is
    ever frozen it adds nothing. `worst` (Table 5): F_s is downloaded in every round.
    """
    plans = [config.plan(stage) for stage in range(1, config.stage_count + 1)]
    every, total = config.calibration.every, 0
    freezes = any(plan.frozen for plan in plans)
    for plan, rounds in zip(plans, config.round_counts, strict=True):
        down = plan.present if worst else plan.trained
        total += rounds * (count(measured, down) + count(measured, plan.trained))
        if worst or config.calibration.scope == "active" or not freezes:
            continue
        if every == "stage":
            total += count(measured, plan.calibrated)
        elif every != "never":
            total += rounds // (1 if every == "round" else every) * count(measured, plan.frozen)
    return 4.0 * total


def kept_by_layers(plan: StagePlan, measured: Measured) -> float:
    """Bytes that the trained layers keep of one sample, for its backward pass."""
    return sum(_kept(plan, measured, part) for part in plan.trained if part not in WHOLE_BATCH)


def _kept(plan: StagePlan, measured: Measured, part: str) -> float:
    given = plan.frozen and part == plan.trained[0]  # what goes in is the prefix's tokens
    return measured.parts[part].kept_bytes + (0 if given else measured.parts[part].entering_bytes)


def _share(config: RunConfig, frozen: str) -> float:
    """Of the steps: those that do not skip a frozen part."""
    return 1.0 if frozen == STEM else 1 - config.stages.depth_dropout


def _widest(parts: Iterable[Part]) -> float:
    return max((part.widest_bytes for part in parts), default=0.0)
