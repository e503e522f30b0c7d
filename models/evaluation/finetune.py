"""Fine-tuning of a whole encoder with a linear head on labelled images, as arXiv 2401.11647, section 4.1, evaluates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwfed.config import ModelSection
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.models.backbones import load_encoder
from lwfed.models.encoder import Encoder
from lwfed.models.evaluation.features import pixels
from lwfed.models.local import Images
from lwfed.models.optimiser import AdamW
from lwfed.seeds import derive

EPOCHS, WARMUP_SHARE = 40, 0.25  # 10 of 40 epochs
BATCH_SIZE, LR, WEIGHT_DECAY = 256, 1e-3, 1e-5


@dataclass(frozen=True)
class Labelled:
    images: Images  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N]


def finetune(
    model: ModelSection,
    tensors: Mapping[str, Tensor],
    train: Labelled,
    queries: Images,
    seed: int,
    epochs: int = EPOCHS,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Labels [M] of `queries` by the encoder of `tensors` (left unchanged) after training on `train`; with fresh weights "scratch".

    AdamW, linear rise and cosine, RandAugment. `on_epoch` is given epoch (1-based) and mean loss. Raises MissingDependency without
    torchvision.
    """
    augment = _rand_augment()
    classes = int(train.labels.max()) + 1
    network = _network(model, tensors, classes, torch.Generator().manual_seed(derive(seed, "finetune", "head")))
    optimiser = AdamW(dict(network.named_parameters()), WEIGHT_DECAY)
    batch = min(BATCH_SIZE, len(train.labels))
    per_epoch = len(train.labels) // batch
    for epoch in range(epochs):
        order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(derive(seed, "finetune", "order", epoch)))
        total = 0.0
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(derive(seed, "finetune", "augment", epoch))
            for step in range(per_epoch):
                rows = order[step * batch : (step + 1) * batch]
                images = torch.stack([augment(image) for image in _uint8(train.images, rows)])
                loss = F.cross_entropy(network(pixels(images)), train.labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step(_lr((epoch + step / per_epoch) / epochs))
                total += loss.item()
        if on_epoch:
            on_epoch(epoch + 1, total / per_epoch)
    network.eval()
    with torch.no_grad():
        parts = [network(pixels(queries[first : first + BATCH_SIZE])).argmax(dim=1) for first in range(0, len(queries), BATCH_SIZE)]
    return torch.cat(parts)


def _network(model: ModelSection, tensors: Mapping[str, Tensor], classes: int, generator: torch.Generator) -> nn.Sequential:
    encoder: Encoder = load_encoder(model, {name: tensor.clone() for name, tensor in tensors.items()})
    head = nn.Linear(model.width, classes)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    return nn.Sequential(encoder.requires_grad_(True), head).train()


def _lr(share: float) -> float:
    """After this share of the steps."""
    if share < WARMUP_SHARE:
        return LR * share / WARMUP_SHARE
    return LR * 0.5 * (1 + math.cos(math.pi * (share - WARMUP_SHARE) / (1 - WARMUP_SHARE)))


def _uint8(images: Images, rows: Tensor) -> Tensor:
    return images[rows] if isinstance(images, Tensor) else torch.from_numpy(images[rows.numpy()])


def _rand_augment() -> Callable[[Tensor], Tensor]:
    import_torchvision()
    from torchvision.transforms import v2

    made: Callable[[Tensor], Tensor] = v2.RandAugment()
    return made
