"""Labels of queries by those of a bank: weighted kNN and a linear classifier. Deterministic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lwfed.errors import DataError

TEMPERATURE = 0.07  # of kNN's votes: Wu et al., arXiv 1805.01978, section 3.4
L2 = 1.0  # penalty |W|^2 / 2 against the summed cross-entropy: scikit-learn's default C = 1
QUERIES_AT_ONCE = 256  # of kNN: bounds its memory to 1 KiB per image of the bank


def knn(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Labels [M] of `queries` [M, D] by the k nearest of `bank` [N, D], by cosine similarity.

    Each neighbour votes for its label with weight exp(cosine / 0.07); equal votes go to the smaller label. Labels are
    integers >= 0. A bank of fewer than k uses all of it. Raises DataError without images.
    """
    _need(bank, queries)
    unit_bank = F.normalize(bank, dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    for some, of_some in zip(torch.split(queries, QUERIES_AT_ONCE), torch.split(votes, QUERIES_AT_ONCE), strict=True):
        nearest = (F.normalize(some, dim=1) @ unit_bank.T).topk(min(k, len(bank)), dim=1)
        of_some.scatter_add_(1, bank_labels[nearest.indices], ((nearest.values - 1) / TEMPERATURE).exp())
    return votes.argmax(dim=1)


def linear_probe(bank: Tensor, bank_labels: Tensor, queries: Tensor) -> Tensor:
    """Labels [M] of `queries` [M, D] by a linear classifier fitted to `bank` [N, D].

    Multinomial logistic regression with an L2 penalty, on features standardised by the bank's mean and deviation;
    convex, full batch, from zero. Raises DataError without images.
    """
    _need(bank, queries)
    deviation, mean = torch.std_mean(bank.double(), dim=0, correction=0)
    deviation = torch.where(deviation < 1e-12, 1, deviation)
    weight, bias = _fit((bank - mean) / deviation, bank_labels)
    return ((queries - mean) / deviation @ weight.T + bias).argmax(dim=1)


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


def _need(bank: Tensor, queries: Tensor) -> None:
    if not len(bank) or not len(queries):
        raise DataError(f"{len(bank)} labelled images to compare with and {len(queries)} to test: both need at least one")
