"""Updates of devices as files of weights, whatever they were sent as."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lwfed.config import TransferSection
from lwfed.errors import InvalidPayload
from lwfed.wire import deltas, tensors
from lwfed.wire.sizes import stated_shapes


def check(transfer: TransferSection, received: Collection[Path], update: Path) -> None:
    """Raises InvalidPayload unless devices that began with the files `received` may upload `update`, and it makes finite weights."""
    shapes = {name: shape for path in received for name, shape in stated_shapes(path).items()}
    if transfer.codec == "fp32":
        tensors.check_update(update, shapes)
        return
    change = deltas.decode(update.read_bytes(), shapes, transfer.codec)
    for path in received:
        for name, tensor in tensors.iterate(path, stated_shapes(path)):
            with np.errstate(over="ignore"):
                finite = np.isfinite(tensor + change[name]).all()
            if not finite:
                raise InvalidPayload(f"tensor {name} holds values that are not finite once its difference is added")


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
        before |= tensors.decode(path, stated_shapes(path))
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
