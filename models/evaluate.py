"""How good features are, on labelled images that no device trained on: kNN and a linear classifier.

Runs on the server. Features [N, D] may also be raw pixels: the base line that a trained encoder has to beat.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lwfed.errors import DataError
from lwfed.models.encoder import Encoder
from lwfed.models.local import Images

L2 = 1.0  # penalty |W|^2 / 2 against the summed cross-entropy: scikit-learn's default C = 1
QUERIES_AT_ONCE = 256  # of kNN: bounds its memory to 1 KiB per image of the bank


@torch.no_grad()
def features(encoder: Encoder, images: Images, batch_size: int = 256) -> Tensor:
    """Features of uint8 images [N, C, H, W] -> float32 [N, width], on the CPU."""
    device = encoder.device
    batches = (encoder.features(_pixels(images[i : i + batch_size]).to(device)) for i in range(0, len(images), batch_size))
    return torch.cat([batch.cpu() for batch in batches])


def raw_pixels(images: Images) -> Tensor:
    """uint8 images [N, C, H, W] -> float32 [N, C * H * W] in [0, 1]."""
    return _pixels(images).flatten(1)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int) -> float:
    """Share of `queries` [M, D] whose label the k nearest of `bank` [N, D] give, by cosine similarity.

    Each neighbour votes for its label with weight (1 + cosine) / 2: a majority in which nearness breaks ties; equal votes
    go to the smaller label. Labels are integers >= 0. A bank of fewer than k uses all of it. Raises DataError without images.
    """
    _need(bank, queries)
    unit_bank = F.normalize(bank, dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    for some, of_some in zip(torch.split(queries, QUERIES_AT_ONCE), torch.split(votes, QUERIES_AT_ONCE), strict=True):
        nearest = (F.normalize(some, dim=1) @ unit_bank.T).topk(min(k, len(bank)), dim=1)
        of_some.scatter_add_(1, bank_labels[nearest.indices], (1 + nearest.values) / 2)
    return _share(votes, query_labels)


def probe_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Share of `queries` [M, D] that a linear classifier fitted to `bank` [N, D] gets right.

    Multinomial logistic regression with an L2 penalty, on features standardised by the bank's mean and deviation;
    convex, full batch, from zero: deterministic. Raises DataError without images.
    """
    _need(bank, queries)
    deviation, mean = torch.std_mean(bank.double(), dim=0, correction=0)
    deviation = torch.where(deviation < 1e-12, 1, deviation)
    weight, bias = _fit((bank - mean) / deviation, bank_labels)
    return _share((queries - mean) / deviation @ weight.T + bias, query_labels)


def _fit(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [classes, D] and bias [classes] of the classifier; inputs float64 [N, D]."""
    weight = inputs.new_zeros(int(labels.max()) + 1, inputs.shape[1]).requires_grad_()
    bias = inputs.new_zeros(len(weight)).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        penalty = L2 / 2 * weight.square().sum()
        loss = (F.cross_entropy(inputs @ weight.T + bias, labels, reduction="sum") + penalty) / len(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _pixels(images: Images) -> Tensor:
    chosen = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    return chosen / 255


def _share(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())


def _need(bank: Tensor, queries: Tensor) -> None:
    if not len(bank) or not len(queries):
        raise DataError(f"{len(bank)} labelled images to compare with and {len(queries)} to test: both need at least one")
