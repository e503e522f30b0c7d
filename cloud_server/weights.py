"""Updates of devices as files of weights, whatever they were sent as."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lwfed.config import TransferSection
from lwfed.errors import InvalidPayload
from lwfed.plan import VARIANCE
from lwfed.wire import deltas, tensors


def check(transfer: TransferSection, received: Collection[Path], update: Path) -> None:
    """Raises InvalidPayload unless devices that began with the files `received` may upload `update`, and it makes sound weights."""
    shapes = {name: shape for path in received for name, shape in tensors.stated_shapes(path).items()}
    if transfer.codec == "fp32":
        for name, weights in tensors.iterate(update, shapes):
            _check(name, weights)
        return
    change = deltas.decode(update.read_bytes(), shapes, transfer.codec)
    for path in received:
        for name, before in tensors.iterate(path, tensors.stated_shapes(path)):
            with np.errstate(over="ignore"):
                _check(name, before + change[name])


def _check(name: str, weights: tensors.Array) -> None:
    if not np.isfinite(weights).all():
        raise InvalidPayload(f"tensor {name} holds values that are not finite once its difference is added")
    if name.endswith(VARIANCE) and (weights < 0).any():
        raise InvalidPayload(f"tensor {name} holds variances below 0")


@contextmanager
def as_weights(transfer: TransferSection, received: Iterable[Path], updates: Iterable[Path], folder: Path) -> Iterator[list[Path]]:
    """`updates`, whose content has been checked; those that are differences are added to `received` in files below `folder`.

    `received` are the files of the parts that the devices began with. The files are there while the block lasts.
    """
    if transfer.codec == "fp32":
        yield list(updates)
        return
    before: dict[str, tensors.Array] = {}
    for path in received:
        before |= tensors.decode(path, tensors.stated_shapes(path))
    shapes = {name: tensor.shape for name, tensor in before.items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        files = []
        for number, path in enumerate(updates):
            change = deltas.decode(path.read_bytes(), shapes, transfer.codec)
            files.append(folder / f"{number}.safetensors")
            files[-1].write_bytes(tensors.encode({name: tensor + change[name] for name, tensor in before.items()}))
        yield files
    finally:
        shutil.rmtree(folder)
