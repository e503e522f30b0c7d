"""Dealing the images of a data set to devices: who gets which classes, and how many images.

Each function takes row numbers and returns one array of them per device, together all that were given.

RandomState, not the newer Generator: numpy promises never to change its streams, and server and devices
may run different versions of numpy, while no image may be in two shares.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lwfed.config.schema import DataSection
from lwfed.data.images import Labels
from lwfed.errors import DataError
from lwfed.seeds import derive

BY_CLASS = ("dirichlet", "classes", "folders")  # of a shared folder, sub-folders are the classes

Rows = npt.NDArray[np.int64]
Random = np.random.RandomState


def stream(seed: int, *labels: int | str) -> Random:
    """The random stream of the run's `seed` for one purpose."""
    derived = derive(seed, "shares", *labels)
    return Random([derived & 0xFFFFFFFF, derived >> 32])


def deal(rows: Rows, labels: Labels | None, data: DataSection, seed: int) -> list[Rows]:
    """`rows`, in random order, dealt as `data` says; `labels` [all rows of the set], which those of BY_CLASS need, number classes.

    Raises DataError when the partition cannot be made.
    """
    random = stream(seed, data.partition, 0)
    match data.partition:
        case "even":
            return even(rows, data.devices)
        case "quantity":
            return quantity(rows, data.devices, data.quantity_beta, data.min_images, random)
    assert labels is not None, f"{data.partition} deals by class"
    match data.partition:
        case "dirichlet":
            return dirichlet(rows, labels, data.devices, data.dirichlet_beta, random)
        case "classes":
            return classes(rows, labels, data.devices, data.classes_per_device, random)
        case "folders":
            return folders(rows, labels, data.devices)


def even(rows: Rows, devices: int) -> list[Rows]:
    """Sizes that differ by one at most."""
    return np.array_split(rows, devices)


def dirichlet(rows: Rows, labels: Labels, devices: int, beta: float, random: Random) -> list[Rows]:
    """Each class is cut in proportions drawn from Dir(beta) (Yurochkin et al., arXiv 1905.12022); a device may end up with very few."""
    parts: list[list[Rows]] = [[] for _ in range(devices)]
    for kind in np.unique(labels[rows]):
        members = random.permutation(rows[labels[rows] == kind])
        for part, piece in zip(parts, np.split(members, _cuts(len(members), devices, beta, random)), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def quantity(rows: Rows, devices: int, beta: float, least: int, random: Random) -> list[Rows]:
    """Sizes of `least` each, where there are so many, and what remains in proportions drawn from Dir(beta); classes as they come."""
    least = least if devices * least <= len(rows) else 0
    free = len(rows) - devices * least
    return np.split(rows, _cuts(free, devices, beta, random) + least * np.arange(1, devices))


def _cuts(count: int, devices: int, beta: float, random: Random) -> Rows:
    """Where to cut `count` things into proportions drawn from Dir(beta)."""
    proportions = random.dirichlet(np.full(devices, beta))
    if not np.isfinite(proportions).all():  # so small a beta that all draws round to 0: the limit, everything to one
        proportions = np.eye(devices)[random.randint(devices)]
    return (np.cumsum(proportions)[:-1] * count).astype(np.int64)


def classes(rows: Rows, labels: Labels, devices: int, each: int, random: Random) -> list[Rows]:
    """`each` classes a device, every class to somebody, its images evenly among those who have it.

    FedAvg's shards (McMahan et al., arXiv 1602.05629, section 3) cut at the borders of classes, so that no device gets
    more classes than it should. Raises DataError when the numbers do not allow it.
    """
    kinds = np.unique(labels[rows])
    if not len(kinds) <= each * devices or each > len(kinds):
        fitting = f"between {-(-len(kinds) // devices)} and {len(kinds)}"
        raise DataError(
            f"data.classes_per_device {each} does not deal {len(kinds)} classes to data.devices {devices}: choose a number {fitting}"
        )
    dealt = np.zeros(len(kinds), np.int64)  # how many devices have the class; never differs by more than one
    holders: list[list[int]] = [[] for _ in kinds]
    for device in range(devices):
        hand = np.lexsort((random.permutation(len(kinds)), dealt))[:each]  # the least dealt, by lot among equals
        dealt[hand] += 1
        for kind in hand:
            holders[kind].append(device)
    parts: list[list[Rows]] = [[] for _ in range(devices)]
    for kind, among in zip(kinds, holders, strict=True):
        members = random.permutation(rows[labels[rows] == kind])
        for device, piece in zip(among, np.array_split(members, len(among)), strict=True):
            parts[device].append(piece)
    return [np.concatenate(part) for part in parts]


def folders(rows: Rows, numbers: Labels, devices: int) -> list[Rows]:
    """Whole sub-folders, of which `numbers` says where each row lies: the first to device 0, the second to device 1, and round again."""
    return [rows[numbers[rows] % devices == device] for device in range(devices)]
