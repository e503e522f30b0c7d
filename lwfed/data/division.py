"""How the images of a source are divided among server and devices, without reading their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lwfed.config import DataSection, RunConfig
from lwfed.data import scan, shares
from lwfed.data.images import Labels
from lwfed.data.partitions import BY_CLASS
from lwfed.data.sets import ImageSet, open_set
from lwfed.data.shares import Reserve, Shares
from lwfed.data.source import Source
from lwfed.errors import DataError

WITHOUT = "use even or quantity"


@dataclass(frozen=True)
class Division:
    labels: Labels | None  # [images], indices into `classes`; None without one class per image
    classes: tuple[str, ...]
    shares: Shares


def divide(source: Source, config: RunConfig) -> Division:
    """The shares of a divided source, or of a folder that all devices share. Raises DataError and MissingDependency."""
    if source.divided:
        return divide_set(open_set(source), source, config)
    return divide_folder(source.folder, scan.find(source.folder), config)


def divide_set(found: ImageSet, source: Source, config: RunConfig) -> Division:
    """Raises DataError when the set cannot be divided so."""
    partition, data = config.data.partition, _cut(config, source)
    if partition == "folders":
        raise DataError(f"data.partition folders deals the sub-folders of a folder, and {source.spec!r} has none: choose another partition")
    if partition in BY_CLASS and found.labels is None:
        raise DataError(
            f"data.partition {partition} needs one class per image, and {source.spec!r} has none ({found.unlabelled}): {WITHOUT}"
        )
    parts = shares.split(found.count, found.labels, data, config.run.seed, has_test_split=found.has_test_split)
    return Division(found.labels, found.classes, parts)


def divide_folder(folder: Path, files: list[Path], config: RunConfig) -> Division:
    """The same for the image `files` of a folder, whose sub-folders are the classes.

    The server keeps nothing of it, since a folder that it names it uses whole. Raises DataError when it names this one.
    """
    calibration = None if config.calibration.every == "never" else config.calibration.data
    for key, spec in (("calibration.data", calibration), ("evaluation.data", config.evaluation.data)):
        if spec is not None and not Source(spec).divided and _overlap(Path(spec).expanduser().resolve(), folder.resolve()):
            raise DataError(
                f"{key} {spec!r} and the folder {str(folder)!r} that the devices share have images in common: give the server others"
            )
    kinds = scan.classes(folder, files)
    if config.data.partition in BY_CLASS and not kinds:
        raise DataError(
            f"data.partition {config.data.partition} needs sub-folders, and in {str(folder)!r} images lie outside of any: {WITHOUT}"
        )
    labels = np.array(scan.class_numbers(folder, files, kinds), dtype=np.int64) if kinds else None
    nothing_kept = config.data.model_copy(update={"auxiliary_share": 0.0, "labelled_share": 0.0})
    return Division(labels, kinds, shares.split(len(files), labels, nothing_kept, config.run.seed, has_test_split=False))


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def reserved(found: ImageSet, source: Source, config: RunConfig) -> Reserve:
    """What the server keeps of a set, whatever becomes of the rest."""
    return shares.reserve(found.count, found.labels, _cut(config, source), config.run.seed, has_test_split=found.has_test_split)


def fingerprint(source: Source, config: RunConfig) -> list[object]:
    """What the shares of a divided source depend on, to name what is made of them. Raises DataError."""
    version: list[object] = [source.spec]
    if source.archived:
        status = Path(source.path).stat()
        version = [source.path, status.st_size, status.st_mtime_ns]
    return [version, _cut(config, source).model_dump(mode="json"), config.run.seed]


def _cut(config: RunConfig, source: Source) -> DataSection:
    """The server keeps a share only of a set that it names; also where it does not calibrate, so that such a run has the same split."""
    named = {"auxiliary_share": source.same_set(config.calibration.data), "labelled_share": source.same_set(config.evaluation.data)}
    return config.data.model_copy(update={share: 0.0 for share, is_named in named.items() if not is_named})
