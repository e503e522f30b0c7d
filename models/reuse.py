"""Views that are used again, and what the frozen prefix makes of them: `train.views_per_round`.

Each image has k pairs of views. A step draws for each image one of its first views and one of its second ones, so that k
pairs give k * k combinations. Their tokens are computed once, in the order of the images and not in that of the steps,
rounded to float16, and kept in a file, which the system holds in memory while there is room:

    <folder>/<views>-<prefix>.features    of each pair and image in turn: the tokens of each view

`views` names all that tokens depend on but the weights, `prefix` the weights. At a stage whose prefix is that of a file and
more layers, the tokens go through these layers only. What has no room on the disk is computed again in each step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.models.ssl import METHODS
from lwfed.models.step import Batch, Branches, frozen_tokens
from lwfed.plan import StagePlan
from lwfed.seeds import derive

ROWS_AT_ONCE = 512
FREE_SHARE = 0.5  # of the free disk, at most

Choose = Callable[[Tensor], Tensor]  # indices [B] -> uint8 images [B, C, H, W], on the device of the model
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reuse:
    """The views of a local call."""

    pairs: int  # of each image
    seed: int


def reuse(config: RunConfig, plan: StagePlan, participant: int, round: int) -> Reuse | None:
    """Of a device in one round; None: fresh views. They are those of the whole run, or of the round where calibration moves the prefix."""
    pairs = config.train.views_per_round
    if pairs == "fresh" or not plan.frozen:
        return None
    scope = (plan.stage, round) if plan.prefix_moves else ()
    return Reuse(pairs, derive(config.run.seed, "views", participant, *scope))


@dataclass(frozen=True)
class FeatureCache:
    """A folder for the tokens of one device, of one stage or round at a time. A disk that is full costs time only."""

    folder: Path
    parts: tuple[str, ...]  # digests of the frozen parts, in model order
    room_bytes: float  # at most

    def prefixes(self) -> list[str]:
        """Names of all that the prefix begins with, the stem alone first, and of itself."""
        return [_digest(chain) for chain in accumulate(self.parts)]

    def path(self, views: str, prefix: str) -> Path:
        return self.folder / f"{views}-{prefix}.features"

    def room(self) -> float:
        """Bytes for a file beside those that are there. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = sum(file.stat().st_size for file in self.folder.iterdir())
        return min(self.room_bytes - held, FREE_SHARE * shutil.disk_usage(self.folder).free)

    def forget(self, but: Path | None = None) -> None:
        forget(self.folder, but)


def forget(folder: Path, but: Path | None = None) -> None:
    """Delete what a cache has kept in `folder`."""
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            if file != but:
                file.unlink()


class Views:
    """Those of one local call on `count` images."""

    def __init__(self, config: RunConfig, reuse: Reuse, branches: Branches, count: int, choose: Choose) -> None:
        method, generator = METHODS[config.ssl.method], torch.Generator().manual_seed(reuse.seed)
        self._config, self._reuse, self._branches = config, reuse, branches
        self._count, self._rows, self._choose = count, reuse.pairs * count, choose
        self._views = method.draw_views(config, self._rows, generator)
        self._patches = method.draw_kept(config, self._rows, generator)
        self._file: _File | None = None

    def keep(self, cache: FeatureCache, images: str, on_rows: Progress | None = None) -> None:
        """Take the tokens from `cache`, where they are put first if they are not there. `images` names the images."""
        views, prefixes = self._name(images), cache.prefixes()
        shape = (len(self._views), *self._computed(0, torch.zeros(1, dtype=torch.long)).shape[1:])
        path = cache.path(views, prefixes[-1])
        with contextlib.suppress(OSError):
            if not path.is_file():
                room, all_bytes = cache.room(), self._rows * _bytes(shape)
                earlier = [(layers, cache.path(views, prefix)) for layers, prefix in enumerate(prefixes[:-1])]
                passed, source = next(((layers, file) for layers, file in reversed(earlier) if file.is_file()), (0, None))
                if room < all_bytes:
                    cache.forget()
                    room, source = cache.room(), None
                below = _File(source, shape) if source else None
                _write(path, self._blocks(shape, passed, below, on_rows), room)
            cache.forget(but=path)
            self._file = _File(path, shape)

    def batch(self, seed: int, step: int, indices: Tensor) -> Batch:
        """Step number `step` (0-based) of the local call of that seed, on the images `indices` [B]."""
        generator = torch.Generator().manual_seed(derive(seed, "pairs", step))
        pairs = torch.randint(self._reuse.pairs, (len(self._views), len(indices)), generator=generator)
        rows = list(pairs * self._count + indices)
        return self._batch(rows, tuple(self._tokens(number, one) for number, one in enumerate(rows)))

    def _name(self, images: str) -> str:
        config, prefix = self._config, self._branches.prefix
        assert prefix is not None
        drawn = [self._reuse.pairs, self._reuse.seed, images, config.views.model_dump(mode="json")]
        masked = None if self._patches is None else config.ssl.mask_ratio
        computed = [config.train.batch_size, self._branches.micro_batch, config.train.precision, prefix.engine, torch.__version__]
        return _digest(json.dumps([config.model.model_dump(mode="json"), config.ssl.method, masked, *drawn, *computed]))

    def _blocks(self, shape: tuple[int, ...], passed: int, below: _File | None, on_rows: Progress | None) -> Iterator[Tensor]:
        """float16 [rows, *shape] of all rows, some at a time; those in `below` have passed so many layers already."""
        if on_rows:
            on_rows(0, self._rows)
        size = min(ROWS_AT_ONCE, self._config.train.batch_size)
        for first in range(0, self._rows, size):
            rows = torch.arange(first, min(first + size, self._rows))
            if below is not None and int(rows[-1]) < below.rows:
                known = tuple(below.read(number, rows) for number in range(shape[0]))
                block = self._batch([rows] * shape[0], known, passed)
                yield torch.stack([frozen_tokens(self._branches, block, self._config, number).half() for number in range(shape[0])], 1)
            else:
                yield torch.stack([self._computed(number, rows) for number in range(shape[0])], 1)
            if on_rows:
                on_rows(first + len(rows), self._rows)

    def _tokens(self, number: int, rows: Tensor) -> Tensor:
        """float16 [B, ...] of view `number`."""
        kept = rows < (self._file.rows if self._file else 0)
        if self._file is None or not kept.any():
            return self._computed(number, rows)
        if kept.all():
            return self._file.read(number, rows).to(self._branches.online.device)
        rest = self._computed(number, rows[~kept])
        found = rest.new_empty(len(rows), *rest.shape[1:])
        found[kept], found[~kept] = self._file.read(number, rows[kept]).to(rest.device), rest
        return found

    def _computed(self, number: int, rows: Tensor) -> Tensor:
        return frozen_tokens(self._branches, self._batch([rows] * len(self._views)), self._config, number).half()

    def _batch(self, rows: list[Tensor], tokens: tuple[Tensor, ...] | None = None, passed: int | None = None) -> Batch:
        """Of rows [B] for each view, which are of the same images."""
        images, device = self._choose(rows[0] % self._count), self._branches.online.device
        views = tuple(params[one].to(device) for params, one in zip(self._views, rows, strict=True))
        patches = None if self._patches is None else self._patches[rows[0]].to(device)
        at = self._branches.prefix_layers if passed is None else passed
        return Batch(images, views, patches, tokens=tokens and tuple(one.to(device) for one in tokens), passed=at)


class _File:
    """Of records float16 [views, ...]; read and not mapped, so that it counts as the system's memory and not as this process's."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._path, self._shape = path, shape
        self.rows = path.stat().st_size // _bytes(shape)

    def read(self, number: int, rows: Tensor) -> Tensor:
        """[B, ...] of view `number`."""
        found = np.empty((len(rows), *self._shape[1:]), np.float16)
        with self._path.open("rb", buffering=0) as file:
            for place, row in enumerate(rows.tolist()):
                file.seek(row * _bytes(self._shape) + number * found[0].nbytes)
                file.readinto(found[place])
        return torch.from_numpy(found)


def _write(path: Path, blocks: Iterable[Tensor], room: float) -> None:
    """As many records as there is room for."""
    temporary = path.with_suffix(".part")
    with contextlib.suppress(OSError), temporary.open("wb") as file:
        for block in blocks:
            fit = int((room - file.tell()) // _bytes(tuple(block.shape[1:])))
            file.write(block[: max(0, fit)].cpu().numpy().tobytes())
            if fit < len(block):
                break
    temporary.replace(path)


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * 2


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
