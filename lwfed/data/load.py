"""The images that each role of a run works on: a device's share, the server's auxiliary and labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lwfed.config import RunConfig
from lwfed.data import cache, folder, images, scan
from lwfed.data.division import divide_folder, divide_set, fingerprint, reserved
from lwfed.data.images import Images, Shape
from lwfed.data.sets import Array, ImageSet, open_set
from lwfed.data.source import Progress, Source, open_source
from lwfed.errors import DataError


def device_images(
    spec: str, config: RunConfig, participant: int, kept: Path | None = None, progress: Progress | None = None, *, shared: bool = False
) -> Images:
    """What participant number `participant` (from 0) trains on: its share of a divided source, or its whole folder.

    With `shared`, a folder is of several devices and divided too. `kept` is a folder for decoded images.
    Raises DataError (also for fewer than data.min_images) and MissingDependency.
    """
    source, devices = open_source(spec), config.data.devices
    divided = source.divided or shared
    if divided and participant >= devices:
        raise DataError(
            f"this is device number {participant + 1}, and {spec!r} is cut into data.devices {devices} shares: "
            "start the server with a larger data.devices, or give this device a folder of images"
        )
    if source.divided:
        found = _share(source, config, participant, kept, progress)
    elif shared:
        files = scan.find(source.folder)
        files = [files[row] for row in divide_folder(source.folder, files, config).shares.devices[participant]]
        found = folder.read(source.folder, files, _shape(config), "device", kept, progress)
    else:
        found = _whole(source, config, "device", kept, progress)
    if len(found) < config.data.min_images:
        where = f"device {participant}'s share of {spec!r}" if divided else repr(spec)
        raise DataError(
            f"{len(found)} readable images in {where} ({found.skipped} unreadable); data.min_images is {config.data.min_images}"
        )
    return found


def auxiliary_images(config: RunConfig, kept: Path | None = None, progress: Progress | None = None) -> Images:
    """The server's unlabelled images of `calibration.data`. Raises DataError and MissingDependency."""
    if config.calibration.data is None:
        raise DataError("calibration.data names no images")
    source = open_source(config.calibration.data)
    found = _share(source, config, None, kept, progress) if source.divided else _whole(source, config, "auxiliary", kept, progress)
    if len(found) < 2:
        raise DataError(f"calibration needs at least 2 images; {config.calibration.data!r} gives {len(found)}: raise data.auxiliary_share")
    return found


def labelled_images(config: RunConfig, kept: Path | None = None, progress: Progress | None = None) -> Images:
    """The server's labelled images of `evaluation.data`, for no training: a test split where there is one.

    Raises DataError and MissingDependency.
    """
    if config.evaluation.data is None:
        raise DataError("evaluation.data names no images")
    source = open_source(config.evaluation.data)
    found = _labelled(source, config) if source.divided else _whole(source, config, "labelled", kept, progress)
    if found.labels is None or len(found.classes) < 2 or len(found) < 2:
        raise DataError(
            f"{source.spec!r} gives no labelled images: put each class (two at least) into its own sub-folder, or raise data.labelled_share"
        )
    return found


def labelled_splits(spec: str, shape: Shape, progress: Progress | None = None) -> tuple[Images, Images | None]:
    """All labelled images that `spec` names: those for training, or all, and those of its test split where it has one.

    Raises DataError and MissingDependency.
    """
    source = open_source(spec)
    source.check_labels()
    if not source.divided:
        return folder.read(source.folder, scan.find(source.folder), shape, "labelled", None, progress), None
    found = open_set(source)
    whole = _all(found, shape, progress)
    return whole, _renumbered(_all(open_set(source, "test"), shape, progress), whole.classes) if found.has_test_split else None


def _renumbered(images: Images, classes: tuple[str, ...]) -> Images:
    """With the numbers that `classes` has in another split, and further ones for what is not there."""
    assert images.labels is not None
    every = (*classes, *(name for name in images.classes if name not in classes))
    numbers = np.array([every.index(name) for name in images.classes])
    return replace(images, labels=numbers[images.labels], classes=every)


def _all(found: ImageSet, shape: Shape, progress: Progress | None) -> Images:
    arrays = _counted(found.read(np.arange(found.count)), found.count, progress)
    return Images(images.resize_all(arrays, found.count, shape), found.labels, found.classes)


def _shape(config: RunConfig) -> Shape:
    return Shape(config.model.image_size, config.model.channels)


def _whole(source: Source, config: RunConfig, name: str, kept: Path | None, progress: Progress | None) -> Images:
    return folder.read(source.folder, scan.find(source.folder), _shape(config), name, kept, progress)


def _labelled(source: Source, config: RunConfig) -> Images:
    found = open_set(source)
    if found.has_test_split:
        found = open_set(source, "test")
        rows = np.arange(found.count)
    else:
        rows = reserved(found, source, config).labelled
    pixels = images.resize_all(found.read(rows), len(rows), _shape(config))
    return Images(pixels, None if found.labels is None else found.labels[rows], found.classes)


def _share(source: Source, config: RunConfig, participant: int | None, kept: Path | None, progress: Progress | None) -> Images:
    """The rows of a divided source that `participant` trains on, or the server's auxiliary ones; in a file where they are kept."""
    shape, name = _shape(config), "auxiliary" if participant is None else "device"
    key = folder.digest(fingerprint(source, config), participant, shape.size, shape.channels)
    if kept and (ready := cache.load(kept, name, key)):
        return Images(ready[0], None, ())
    found = open_set(source)
    if participant is None:
        rows = reserved(found, source, config).auxiliary
    else:
        rows = divide_set(found, source, config).shares.devices[participant]
    arrays = _counted(found.read(rows), len(rows), progress)
    if kept:  # read from there in this call as in later ones, so that every round has the same memory
        return Images(folder.keep(kept, name, key, len(rows), shape, enumerate(images.resize_each(arrays, shape)))[0], None, ())
    return Images(images.resize_all(arrays, len(rows), shape), None, ())


def _counted(arrays: Iterable[Array], count: int, progress: Progress | None) -> Iterator[Array]:
    for done, array in enumerate(arrays, 1):
        yield array
        if progress:
            progress(done, count)
