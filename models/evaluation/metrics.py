"""Figures of a classification, as scikit-learn defines them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Each in [0, 1]. Precision, recall and F1 are means over the classes that are there or are predicted; 0 where undefined."""

    accuracy: float
    class_accuracy: float  # mean over the classes that are there: of uneven classes none counts more
    precision: float
    recall: float
    f1: float


def metrics(predicted: Tensor, labels: Tensor) -> Metrics:
    """Of integer labels [N], N >= 1."""
    classes = int(torch.maximum(predicted.max(), labels.max())) + 1
    hits, told, there = (torch.bincount(of, minlength=classes).double() for of in (labels[predicted == labels], predicted, labels))
    precision, recall = (torch.where(of > 0, hits / of.clamp(min=1), 0) for of in (told, there))
    f1 = torch.where(hits > 0, 2 * hits / (told + there).clamp(min=1), 0)
    seen = (told + there) > 0
    return Metrics(
        accuracy=float(hits.sum() / len(labels)),
        class_accuracy=float(recall[there > 0].mean()),
        precision=float(precision[seen].mean()),
        recall=float(recall[seen].mean()),
        f1=float(f1[seen].mean()),
    )
