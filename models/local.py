"""The local call of arXiv 2401.11647, Algorithm 2: epochs of training on the images of one place.

The same call serves the device (`device_task`) and the server's calibration (`calibration_task`). It is a function of
configuration, task, weights, images and, with MOON, the previous local model: equal inputs give equal bits on one machine
with one number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.data.kept import KeptPixels
from lwfed.errors import ConfigError, DataError, Diverged
from lwfed.models import fitting
from lwfed.models.reuse import FeatureCache, Progress, Reuse, Views
from lwfed.models.schedules import learning_rate
from lwfed.models.step import METHOD_ALONE, Batch, Branches, Means, Terms, draw_batch, prepare, train_step
from lwfed.plan import Place, StagePlan, part_of
from lwfed.seeds import derive
from lwfed.wire.records import MAX_LOSS, MAX_ORDINAL

Images = np.ndarray[Any, np.dtype[np.uint8]] | KeptPixels | Tensor  # uint8 [N, C, H, W]
HASHED_AT_ONCE = 256  # images


@dataclass(frozen=True)
class LocalTask:
    trained: tuple[str, ...]  # parts of lwfed.plan, the last of the model
    epochs: int
    batch_size: int  # images; fewer where there are fewer
    lr: float  # per 256 images of the batch
    seed: int  # of order, views and every other draw
    place: Place  # of the round in the run; the schedule reads it
    terms: Terms = METHOD_ALONE
    reuse: Reuse | None = None  # None: new views in each step


@dataclass(frozen=True)
class StepReport:
    epoch: int  # 1-based, of `epochs`
    epochs: int
    step: int  # 1-based within the call, of `steps`
    steps: int
    loss: float
    lr: float  # of this step


@dataclass(frozen=True)
class LocalSummary:
    images: int  # that the place holds; its weight in the mean
    steps: int
    losses: tuple[float, ...]  # mean of each epoch


def device_task(config: RunConfig, plan: StagePlan, seed: int, place: Place, reuse: Reuse | None = None) -> LocalTask:
    """What a device does in one round."""
    train = config.train
    return LocalTask(plan.trained, train.epochs, train.batch_size, train.lr, seed, place, Terms(config.alignment, train.proximal), reuse)


def calibration_task(config: RunConfig, plan: StagePlan, seed: int, place: Place) -> LocalTask:
    """What the server does after aggregation, when it calibrates (v1-v3 of the paper)."""
    calibration = config.calibration
    if calibration.every == "stage":  # a training of its own: at the stage's place little of the rate would be left
        place = Place(0, 1, 0, 1, place.lr_scale)
    return LocalTask(plan.calibrated, calibration.epochs, calibration.batch_size, calibration.lr, seed, place)


def train_local(
    config: RunConfig,
    task: LocalTask,
    tensors: Mapping[str, Tensor],
    images: Images,
    on_step: Callable[[StepReport], None] | None = None,
    previous: Mapping[str, Tensor] | None = None,
    means: Means | None = None,
    cache: FeatureCache | None = None,
    on_rows: Progress | None = None,
) -> tuple[dict[str, Tensor], LocalSummary]:
    """Train the parts `task.trained` of the model `tensors` (all parts present, left unchanged) on uint8 images [N, C, H, W].

    `previous` is what this place's last local call of the stage returned; without `means` torch runs all layers, with
    as many images at a time as `train.micro_batch` says. Tokens of views that are used again are kept in `cache`, if any, and
    `on_rows` follows how they are made. Returns the trained tensors, without gradients, and a summary.
    Runs on the device where `tensors` are; images may be there or in main memory.
    Raises DataError when the images do not fit, ConfigError for more than a million steps, Diverged when a weight is not finite or
    a loss is none that a device could report, ValueError when the parts cannot be trained.
    """
    _check(config, images)
    batch_size = min(task.batch_size, len(images))
    means = means or Means(micro_batch=default_micro_batch(config, tensors, task, batch_size))
    branches = prepare(config, tensors, task.trained, task.terms, previous, means)
    per_epoch = len(images) // batch_size  # the incomplete last batch is dropped
    if (steps := task.epochs * per_epoch) > MAX_ORDINAL:
        raise ConfigError(f"{steps} steps are more than a round can have, {MAX_ORDINAL}: lower train.epochs or raise train.batch_size")
    sums = [0.0] * task.epochs
    draw = _draws(config, task, images, branches, cache, on_rows)
    for done, (epoch, indices) in enumerate(_batches(task, len(images), batch_size)):
        lr = learning_rate(task.lr, batch_size, config.train, task.place, done / steps)
        batch = draw(done, indices)
        loss = train_step(branches, batch, lr, config, task.terms)
        if not abs(loss) < MAX_LOSS:
            raise Diverged(_advice(f"the loss is {loss} in epoch {epoch + 1} of {task.epochs}, step {done + 1} of {steps}", lr))
        sums[epoch] += loss
        if on_step:
            on_step(StepReport(epoch + 1, task.epochs, done + 1, steps, loss, lr))
    return _trained(branches, task.trained, lr), LocalSummary(len(images), steps, tuple(total / per_epoch for total in sums))


def default_micro_batch(config: RunConfig, tensors: Mapping[str, Tensor], task: LocalTask, batch_size: int) -> int:
    """What `train.micro_batch` gives where memory does not count."""
    need = fitting.measure(config, tensors, task.trained, task.terms, batch_size)
    return fitting.micro_batch(config, need, next(iter(tensors.values())).device)


def _check(config: RunConfig, images: Images) -> None:
    model = config.model
    wanted = (model.channels, model.image_size, model.image_size)
    if tuple(images.shape[1:]) != wanted or str(images.dtype).removeprefix("torch.") != "uint8":
        raise DataError(f"images must be uint8 [N, {', '.join(map(str, wanted))}], not {images.dtype} {list(images.shape)}")
    if len(images) < 2:
        raise DataError(f"{len(images)} images cannot train: BatchNorm and the negatives need at least 2; add images to this place")


def _batches(task: LocalTask, count: int, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(epoch, indices [batch]) of each step."""
    for epoch in range(task.epochs):
        generator = torch.Generator().manual_seed(derive(task.seed, "order", epoch))
        order = torch.randperm(count, generator=generator)
        for first in range(0, count - batch + 1, batch):
            yield epoch, order[first : first + batch]


def _draws(
    config: RunConfig, task: LocalTask, images: Images, branches: Branches, cache: FeatureCache | None, on_rows: Progress | None
) -> Callable[[int, Tensor], Batch]:
    """What makes the batch of a step number (0-based) and its indices."""

    def choose(indices: Tensor) -> Tensor:
        return _choose(images, indices, branches.online.device)

    if task.reuse is None or branches.prefix is None:
        return lambda step, indices: draw_batch(config, task.seed, step, choose(indices), branches.prefix_layers)
    views = Views(config, task.reuse, branches, len(images), choose)
    if cache is not None:
        views.keep(cache, _digest(images), on_rows)
    return partial(views.batch, task.seed)


def _digest(images: Images) -> str:
    found = hashlib.sha256()
    for first in range(0, len(images), HASHED_AT_ONCE):
        some = images[first : first + HASHED_AT_ONCE]
        found.update(np.ascontiguousarray(some.cpu().numpy() if isinstance(some, Tensor) else some).data)
    return found.hexdigest()


def _choose(images: Images, indices: Tensor, device: torch.device) -> Tensor:
    if isinstance(images, Tensor):
        return images[indices.to(images.device)].to(device)
    return torch.from_numpy(images[indices.numpy()]).to(device)


def _trained(branches: Branches, trained: tuple[str, ...], lr: float) -> dict[str, Tensor]:
    """Weights, and running statistics where the backbone has them."""
    result = {name: tensor.detach() for name, tensor in branches.online.state_dict().items() if part_of(name) in trained}
    for name, tensor in result.items():
        if not bool(tensor.isfinite().all()):
            raise Diverged(_advice(f"tensor {name} is not finite after the last step", lr))
    return result


def _advice(what: str, lr: float) -> str:
    return f"training diverged: {what} (learning rate {lr:.3g}); lower train.lr or calibration.lr, or raise ssl.temperature"
