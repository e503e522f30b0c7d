"""torchvision's data sets by name. The one place below `lwfed` where torch may be imported, inside functions only."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lwfed.data import downloads
from lwfed.errors import DataError, MissingDependency

CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "mnist": "MNIST"}
DOWNLOAD_TIMEOUT_S = 30
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep_alive: list[object] = []  # an operator lives as long as the library object that defined it


def read(name: str, train: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]:
    """Images [N, H, W] or [N, H, W, 3], labels [N] and class names.

    Raises MissingDependency without torchvision, DataError when the files are missing or damaged.
    """
    kind = getattr(import_torchvision().datasets, CLASSES[name])
    try:
        dataset = kind(root=str(downloads.root()), train=train, download=False)
    except (RuntimeError, OSError, ValueError, EOFError):
        raise downloads.not_whole(name) from None
    return np.asarray(dataset.data, dtype=np.uint8), np.asarray(dataset.targets, dtype=np.int64), tuple(dataset.classes)


def fetch(name: str) -> Path:
    """Download the data set unless it is there; its folder. Raises MissingDependency and DataError."""
    kind = getattr(import_torchvision().datasets, CLASSES[name])
    try:
        downloads.root().mkdir(parents=True, exist_ok=True)
        with _impatient():
            kind(root=str(downloads.root()), train=True, download=True)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"the data set {name!r} cannot be downloaded ({error}); put its files into {downloads.folder(name)} by hand, "
            "or set LWFED_DATASETS to the folder that holds it"
        ) from None
    return downloads.folder(name)


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def import_torchvision() -> ModuleType:
    """torchvision with its data sets, even where its compiled operators do not fit torch.

    A torchvision built for another torch fails at import with ``operator torchvision::nms does not exist``. Its data
    sets and transforms are Python, so declaring the missing operators is enough. Raises MissingDependency.
    """
    try:
        import torchvision
    except ImportError as error:
        raise MissingDependency(f"data sets by name need torchvision ({error}): pip install 'lwfed[sets]'") from None
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_operators()
        import torchvision
    return torchvision  # type: ignore[no-any-return]


def _declare_operators() -> None:
    import torch

    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _keep_alive.append(library)
    for schema in OPERATORS:
        library.define(schema)
