"""What a local call takes of a device's memory, and how it is made to fit: measured on the model itself, not assumed.

Most of it does not depend on how many images go through the layers at a time: the process as it is, weights with gradients
and moments, the images, and the prefix's tokens of a whole batch. Heads and loss keep something of a whole batch as well, for a
while. In the rest of a step there is what grows with the micro-batch: what its layers keep, what their backward pass takes beside
it, and what its views take while they are made, for allocators do not give the one's place to the other. Where the micro-batch is
the whole batch, heads, loss and the layers of all views are there at once. A pass of two images through the real layers tells all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace

import psutil
import torch
from torch import Tensor

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import RunConfig
from lwfed.errors import Unfit
from lwfed.models.allocator import let_code_go
from lwfed.models.features import Layout
from lwfed.models.ssl import METHODS
from lwfed.models.step import Batch, Branches, Means, Terms, draw_batch, kept_for_backward, prepare, train_step, views_at_once
from lwfed.plan import part_of

PIECE_BYTES = 8e6  # for the layers of one micro-batch: larger ones are no faster on a processor, whose caches they exceed
WHOLE_BYTES = 12e6  # for those of a batch, of one view, that is not cut: without a second forward pass a step takes 20 to 35 % less time
GPU_PIECE_BYTES = 2e9
LEAST_PIECE = 4  # images of it, where there is memory: with fewer, products are too small to be fast
SPARE = 1.1  # allocators leave gaps
PASSING = 4  # times the largest tensor that the layers keep, for their backward pass, beside what is spare: two gradients, and gaps between
VIEW_COPIES = 12  # of a block of views in float32, while transforms work on it
HEAP_BYTES = 12e6  # what allocators hold beside tensors; a few MB more after sixty steps than after two
CODE_BYTES = 48e6  # of torch, which only training maps; where it cannot be measured
TRIAL_IMAGES = 4


@dataclass(frozen=True)
class Need:
    """Bytes of a local call, above what the process holds before it."""

    fixed: float  # from the first trial on
    per_image: float  # of the micro-batch, kept by the layers, of a view
    batch_size: int
    passing: float = 0.0  # of the micro-batch, while what is kept is taken back
    view_count: int = 1  # of an image; all are kept at once where the micro-batch is the batch
    view_bytes: float = 0.0  # of one of an image, in float32
    whole: float = 0.0  # of a whole batch, for the length of a step
    loss: float = 0.0  # of a whole batch, for heads and loss
    features: float = 0.0  # of all views that are used again, where memory keeps them
    freed: float = 0.0  # that the process holds no longer, once training begins

    def plus(self, extra: float, freed: float = 0.0) -> Need:
        return replace(self, fixed=self.fixed + extra, freed=freed)

    def of(self, micro_batch: int) -> float:
        block = self.view_bytes * min(self.batch_size, views_at_once(micro_batch, self.view_bytes) if self.view_bytes else 0)
        layers = VIEW_COPIES * block + micro_batch * (self.per_image + self.passing)
        if micro_batch < self.batch_size:
            step = max(self.loss, layers)
        else:
            step = self.loss + layers + (self.view_count - 1) * micro_batch * self.per_image
        return SPARE * self.fixed + max(0.0, SPARE * (self.whole + step) - self.freed)


def measure(
    config: RunConfig,
    tensors: Mapping[str, Tensor],
    trained: Iterable[str],
    terms: Terms,
    batch_size: int,
    kept_as: torch.dtype = torch.float32,
    drawn: int = 0,
) -> Need:
    """What training the parts `trained` of the model `tensors` takes with batches of `batch_size`, libraries' code left out.

    The prefix's tokens are `kept_as` such numbers; `drawn` pairs of views and patches are drawn ahead, to be used again.
    """
    branches, batch = _trial(config, tensors, trained, terms, 2)
    images = batch.images
    kept = kept_for_backward(branches, batch, config)
    weights = 4 * sum(tensor.numel() for tensor in branches.trained)
    copies = 6 + bool(branches.target) + bool(branches.received) + bool(branches.anchors) + (config.alignment.method == "moon")
    views = METHODS[config.ssl.method].view_count
    numbers = 0 if kept.tokens is None else math.prod(kept.tokens)
    features = 0 if kept.tokens is None else drawn * views * Layout(kept.tokens, config.train.features_as).kept_bytes
    return Need(
        fixed=HEAP_BYTES + copies * weights,
        per_image=kept.layers,
        passing=PASSING * kept.widest,
        view_count=views,
        whole=batch_size * (images[0].nbytes + views * numbers * kept_as.itemsize)
        + 2 * drawn * _record_bytes(batch) / len(images),  # in pieces, and put together
        loss=batch_size * kept.heads + 4 * METHODS[config.ssl.method].matrices * batch_size**2,
        view_bytes=4 * images[0].numel(),
        batch_size=batch_size,
        features=min(features, config.train.features_mb * 1e6),
    )


def weights_bytes(tensors: Mapping[str, Tensor], trained: Iterable[str]) -> float:
    """What training takes at least: weights, gradients and two moments of `trained`. Nothing is computed for it."""
    parts = set(trained)
    return 4 * 4 * sum(tensor.numel() for name, tensor in tensors.items() if part_of(name) in parts)


def code_bytes(config: RunConfig, tensors: Mapping[str, Tensor], trained: Iterable[str], terms: Terms) -> float:
    """Of libraries, what training maps of them that this process could do without: measured by a step with a few images, in pieces.

    What that step leaves behind in memory, training needs not take any more.
    """
    pieces = None if config.model.backbone in CONVOLUTIONAL else TRIAL_IMAGES // 2

    def step() -> None:
        branches, batch = _trial(config, tensors, trained, terms, TRIAL_IMAGES, pieces)
        train_step(branches, batch, 0.0, config, terms)

    return mapped_by(step)


def mapped_by(run: Callable[[], object]) -> float:
    """Bytes of libraries that `run` maps.

    How much the system maps at a time depends on how its cache holds the files: of ones just installed, several times as
    much as after a restart.
    """
    let_code_go()
    before = _mapped_bytes()
    run()
    return max(0, _mapped_bytes() - before) if before else CODE_BYTES


def _mapped_bytes() -> int:
    """That this process has in memory of files; 0 where the system does not say."""
    return getattr(psutil.Process().memory_info(), "shared", 0)


def _trial(
    config: RunConfig, tensors: Mapping[str, Tensor], trained: Iterable[str], terms: Terms, count: int, pieces: int | None = None
) -> tuple[Branches, Batch]:
    branches = prepare(config, tensors, trained, terms, means=Means(micro_batch=pieces))
    model = config.model
    images = torch.zeros(count, model.channels, model.image_size, model.image_size, dtype=torch.uint8, device=branches.online.device)
    return branches, draw_batch(config, 0, 0, images, branches.prefix_layers)


def _record_bytes(batch: Batch) -> int:
    """Of every random draw of `batch`."""
    params = [getattr(view, one.name) for view in batch.views for one in fields(view)]
    return sum(one.nbytes for one in (*params, *([] if batch.keep is None else [batch.keep])))


def micro_batch(config: RunConfig, need: Need, device: torch.device, room: float = math.inf) -> int:
    """Images at a time, as `train.micro_batch` says; with `auto` as many as are fast, or fewer where `room` bytes are less.

    Raises Unfit when not even one fits, or not as many as are prescribed.
    """
    possible = sizes(config, need, device)
    for size in possible:
        if need.of(size) <= room:
            return size
    raise unfit(need.of(possible[-1]), room)


def sizes(config: RunConfig, need: Need, device: torch.device) -> list[int]:
    """Numbers of images at a time that `train.micro_batch` allows, the best one first; with `auto` the least for each number of pieces."""
    size = piece_size(config, need.batch_size, need.per_image, PIECE_BYTES if device.type == "cpu" else GPU_PIECE_BYTES)
    if config.train.micro_batch != "auto" or config.model.backbone in CONVOLUTIONAL:
        return [size]
    return sorted({_least(need.batch_size, one) for one in range(1, size + 1)}, reverse=True)


def unfit(takes: float, room: float) -> Unfit:
    """Bytes that training takes, and those there are."""
    return Unfit(f"training in this stage takes {takes / 1e6:.0f} MB more, and there is room for {max(0, room) / 1e6:.0f} MB")


def piece_size(config: RunConfig, batch_size: int, per_image: float, piece_bytes: float = PIECE_BYTES) -> int:
    """The best of `sizes`; `per_image` bytes of an image are kept by the layers, of a view."""
    wanted = config.train.micro_batch
    if wanted is None or config.model.backbone in CONVOLUTIONAL:
        return batch_size
    if wanted != "auto":
        return min(batch_size, wanted)
    if batch_size * per_image <= WHOLE_BYTES:
        return batch_size
    return _least(batch_size, max(LEAST_PIECE, int(piece_bytes // per_image)))


def _least(batch_size: int, most: int) -> int:
    """Images at a time with which there are as few pieces as with `most`."""
    return math.ceil(batch_size / math.ceil(batch_size / most))
