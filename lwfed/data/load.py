"""The images that each role of a run works on: a device's share, the server's auxiliary and labelled images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from lwfed.config import DataSection, RunConfig
from lwfed.data import cache, digits, folder, images, shares
from lwfed.data.images import Images, Shape
from lwfed.data.source import Progress, Source, open_source
from lwfed.errors import DataError

Raw = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]


def device_images(
    spec: str, config: RunConfig, participant: int, kept: Path | None = None, progress: Progress | None = None, *, shared: bool = False
) -> Images:
    """What participant number `participant` (from 0) trains on: its share of a set known by name, or its whole folder.

    `kept` is a folder for decoded images. Raises DataError (also for fewer than data.min_images) and MissingDependency.
    """
    source = open_source(spec)
    if source.named and participant >= config.data.devices:
        raise DataError(
            f"this is device number {participant + 1}, and {spec!r} is cut into data.devices {config.data.devices} shares: "
            "start the server with a larger data.devices, or give this device a folder of images"
        )
    if shared and not source.named:
        raise DataError(f"a folder cannot be divided among devices: name a data set instead of {spec!r}")
    found = _unlabelled(source, config, f"device {participant}", kept, progress)
    if len(found) < config.data.min_images:
        raise DataError(
            f"{len(found)} readable images in {spec!r} ({found.skipped} unreadable); data.min_images is {config.data.min_images}"
        )
    return found


def auxiliary_images(config: RunConfig, kept: Path | None = None, progress: Progress | None = None) -> Images:
    """The server's unlabelled images of `calibration.data`. Raises DataError and MissingDependency."""
    if config.calibration.data is None:
        raise DataError("calibration.data names no images")
    found = _unlabelled(open_source(config.calibration.data), config, "auxiliary", kept, progress)
    if len(found) < 2:
        raise DataError(f"calibration needs at least 2 images; {config.calibration.data!r} gives {len(found)}: raise data.auxiliary_share")
    return found


def labelled_images(config: RunConfig, kept: Path | None = None, progress: Progress | None = None) -> Images:
    """The server's labelled images of `evaluation.data`, for no training. Raises DataError and MissingDependency."""
    if config.evaluation.data is None:
        raise DataError("evaluation.data names no images")
    source, shape = open_source(config.evaluation.data), _shape(config)
    if not source.named:
        found = folder.read(source.folder, shape, "labelled", kept, progress)
    elif source.spec == "digits":
        arrays, labels, names = _raw(source, train=True)
        rows = shares.split(labels, _cut(config, source.spec), config.run.seed).labelled
        found = Images(images.resize_all(arrays[rows], shape), labels[rows], names)
    else:
        arrays, labels, names = _raw(source, train=False)
        found = Images(images.resize_all(arrays, shape), labels, names)
    if found.labels is None or len(found.classes) < 2 or len(found) < 2:
        raise DataError(
            f"{source.spec!r} gives no labelled images: put each class (two at least) into its own sub-folder, or raise data.labelled_share"
        )
    return found


def _shape(config: RunConfig) -> Shape:
    return Shape(config.model.image_size, config.model.channels)


def _cut(config: RunConfig, name: str) -> DataSection:
    """How the data set is cut: the server keeps a share only of a set that it uses itself."""
    shares = {"auxiliary_share": config.calibration.every != "never" and config.calibration.data == name}
    shares["labelled_share"] = config.evaluation.data == name
    return config.data.model_copy(update={share: 0.0 for share, used in shares.items() if not used})


def _unlabelled(source: Source, config: RunConfig, role: str, kept: Path | None, progress: Progress | None) -> Images:
    """All of a folder, or the rows that `role` ("auxiliary", "device 3") has in a set known by name."""
    shape, name = _shape(config), role.split()[0]
    if not source.named:
        return folder.read(source.folder, shape, name, kept, progress)
    data = _cut(config, source.spec)
    key = folder.digest(source.spec, role, data.model_dump(mode="json"), config.run.seed, shape.size, shape.channels)
    if kept and (ready := cache.load(kept, name, key)):
        return Images(ready[0], None, ())
    arrays, labels, _ = _raw(source, train=True)
    parts = shares.split(labels, data, config.run.seed, has_test_split=source.spec != "digits")
    rows = parts.auxiliary if role == "auxiliary" else parts.devices[int(role.split()[1])]
    if kept:  # mapped in this call as in later ones, so that every round has the same memory
        return Images(folder.keep(kept, name, key, len(rows), shape, enumerate(images.resize_each(arrays[rows], shape)))[0], None, ())
    return Images(images.resize_all(arrays[rows], shape), None, ())


def _raw(source: Source, train: bool) -> Raw:
    if source.spec == "digits":
        arrays, labels = digits.read()
        return arrays, labels, tuple(str(digit) for digit in range(10))
    from lwfed.data import torchvision_sets

    return torchvision_sets.read(source.spec, train)
