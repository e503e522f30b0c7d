"""Where torchvision's data sets by name lie, and whether they are whole. Imports neither numpy nor torchvision."""

from __future__ import annotations

import os
from pathlib import Path

from lwfed.errors import DataError

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
FILES = {
    "cifar10": ("cifar-10-batches-py", (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")),
    "cifar100": ("cifar-100-python", ("train", "test", "meta")),
    "fashion-mnist": ("FashionMNIST/raw", IDX),
    "kmnist": ("KMNIST/raw", IDX),
    "mnist": ("MNIST/raw", IDX),
}
NAMES = tuple(FILES)


def root() -> Path:
    return Path(os.environ.get("LWFED_DATASETS") or "~/.cache/lwfed/datasets").expanduser()


def folder(name: str) -> Path:
    return root() / FILES[name][0]


def require(name: str) -> None:
    """Raises DataError unless all files of the data set are there."""
    if not all((folder(name) / file).is_file() for file in FILES[name][1]):
        raise not_whole(name)


def not_whole(name: str) -> DataError:
    return DataError(
        f"the data set {name!r} is not, or not whole, in {folder(name)}: download it with `lwfed fetch {name}`, "
        "name the place where it is with LWFED_DATASETS, or take a folder of images instead"
    )
