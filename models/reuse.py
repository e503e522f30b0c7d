"""Views that are used again, and what the frozen prefix makes of them: `train.views_per_round`.

Each image has k pairs of views. A step draws for each image one of its first views and one of its second ones, so that k
pairs give k * k combinations. Their tokens are computed once, in the order of the images and not in that of the steps, and
kept in a file, which the system holds in memory while there is room:

    <folder>/<views>-<prefix>.features    of each pair and image in turn: the tokens of each view

`views` names all that tokens depend on but the weights, `prefix` the weights. At a stage whose prefix is that of a file and
more layers, the tokens go through these layers only. Tokens are rounded to float16 where a stage ends, also where they
are computed from pixels, so that they do not depend on which way they came. What has no room on the disk is computed
again in each step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.models.ssl import METHODS
from lwfed.models.step import Batch, Branches, frozen_tokens
from lwfed.models.views import ViewParams
from lwfed.plan import StagePlan
from lwfed.seeds import derive

ROWS_AT_ONCE = 512
FREE_SHARE = 0.5  # of the free disk, at most
UNFINISHED = ".part"

Choose = Callable[[Tensor], Tensor]  # indices [B] -> uint8 images [B, C, H, W], on the device of the model
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reuse:
    """The views of a local call."""

    pairs: int  # of each image
    seed: int
    rounded_after: tuple[int, ...]  # layers of the prefix; the last one is all of them


def reuse(config: RunConfig, plan: StagePlan, participant: int, round: int) -> Reuse | None:
    """Of a device in one round; None: fresh views. They are those of the whole run, or of the round where calibration moves the prefix."""
    pairs = config.train.views_per_round
    if pairs == "fresh" or not plan.frozen:
        return None
    scope = (plan.stage, round) if plan.prefix_moves else ()
    plans = [plan] if plan.calibrated and config.calibration.scope == "model" else map(config.plan, range(1, plan.stage + 1))
    rounded_after = tuple(len(one.frozen) - 1 for one in plans if one.frozen)
    return Reuse(pairs, derive(config.run.seed, "views", participant, *scope), rounded_after)


@dataclass(frozen=True)
class FeatureCache:
    """A folder for the tokens of one device, of one stage or round at a time. A disk that is full costs time only."""

    folder: Path
    parts: tuple[str, ...]  # digests of the frozen parts, in model order
    room_bytes: float  # at most
    spare_bytes: float = 0.0  # of the free disk, left to others

    def prefixes(self) -> list[str]:
        """Names of all that the prefix begins with, the stem alone first, and of itself."""
        return [_digest(chain) for chain in accumulate(self.parts)]

    def path(self, views: str, prefix: str) -> Path:
        return self.folder / f"{views}-{prefix}.features"

    def room(self) -> float:
        """Bytes for a file beside those that are there. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        held = sum(file.stat().st_size for file in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free
        return min(self.room_bytes - held, FREE_SHARE * free, free - self.spare_bytes)

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
        self._config, self._reuse, self._branches = config, reuse, branches
        self._count, self._rows, self._choose = count, reuse.pairs * count, choose
        self._views, self._patches = _drawn(config, reuse.seed, self._rows)
        self._file: _File | None = None

    def keep(self, cache: FeatureCache, images: str, on_rows: Progress | None = None) -> None:
        """Take the tokens from `cache`, where they are put first if they are not there. `images` names the images."""
        views, prefixes = self._name(images), cache.prefixes()
        shape = (len(self._views), *self._computed(0, torch.zeros(1, dtype=torch.long)).shape[1:])
        path = cache.path(views, prefixes[-1])
        with contextlib.suppress(OSError):
            room, all_bytes = cache.room(), self._rows * _bytes(shape)
            held = path.stat().st_size if path.is_file() else None
            if held is None or held < all_bytes <= room + held:  # cut short by a disk that has room now
                earlier = [(layers, cache.path(views, prefixes[layers])) for layers in self._reuse.rounded_after[:-1]]
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
        train, device = config.train, self._branches.online.device.type
        computed = [train.batch_size, self._branches.micro_batch, train.precision, train.threads, prefix.engine]
        machine = [torch.__version__, torch.backends.cpu.get_cpu_capability(), device]
        return _digest(json.dumps([config.model.model_dump(mode="json"), config.ssl.method, masked, *drawn, *computed, *machine]))

    def _blocks(self, shape: tuple[int, ...], passed: int, below: _File | None, on_rows: Progress | None) -> Iterator[Tensor]:
        """float16 [rows, *shape] of all rows, some at a time; those in `below` have passed so many layers already."""
        if on_rows:
            on_rows(0, self._rows)
        size = min(ROWS_AT_ONCE, self._config.train.batch_size)
        for first in range(0, self._rows, size):
            rows = torch.arange(first, min(first + size, self._rows))
            if below is not None and int(rows[-1]) < below.rows:
                yield torch.stack([self._computed(number, rows, below.read(number, rows), passed) for number in range(shape[0])], 1)
            else:
                yield torch.stack([self._computed(number, rows) for number in range(shape[0])], 1)
            if on_rows:
                on_rows(first + len(rows), self._rows)

    def _tokens(self, number: int, rows: Tensor) -> Tensor:
        """float16 [B, ...] of view `number`."""
        if self._file is None:
            return self._computed(number, rows)
        kept = rows < self._file.rows
        try:
            known = self._file.read(number, rows[kept])
        except OSError:  # the file has gone, or the disk is bad
            self._file = None
            return self._computed(number, rows)
        if kept.all():
            return known.to(self._branches.online.device)
        rest = self._computed(number, rows[~kept])
        found = rest.new_empty(len(rows), *rest.shape[1:])
        found[kept], found[~kept] = known.to(rest.device), rest
        return found

    def _computed(self, number: int, rows: Tensor, tokens: Tensor | None = None, passed: int = 0) -> Tensor:
        """float16 [B, ...] of view `number`, from what the first `passed` layers have given, or from pixels."""
        count, layers = len(self._views), self._reuse.rounded_after[-1]
        for last in self._reuse.rounded_after:
            if tokens is None or last > passed:
                batch = self._batch([rows] * count, None if tokens is None else (tokens,) * count, passed, range(last, layers))
                tokens, passed = frozen_tokens(self._branches, batch, self._config, number).half(), last
        assert tokens is not None
        return tokens

    def _batch(
        self, rows: list[Tensor], tokens: tuple[Tensor, ...] | None = None, passed: int | None = None, skip: Collection[int] = ()
    ) -> Batch:
        """Of rows [B] for each view, which are of the same images."""
        images, device = self._choose(rows[0] % self._count), self._branches.online.device
        views = tuple(params[one].to(device) for params, one in zip(self._views, rows, strict=True))
        patches = None if self._patches is None else self._patches[rows[0]].to(device)
        at = self._branches.prefix_layers if passed is None else passed
        known = None if tokens is None else tuple(one.to(device) for one in tokens)
        return Batch(images, views, patches, skip, known, at)


class _File:
    """Of records float16 [views, ...]; read and not mapped, so that it counts as the system's memory and not as this process's."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._path, self._shape = path, shape
        self.rows = path.stat().st_size // _bytes(shape)

    def read(self, number: int, rows: Tensor) -> Tensor:
        """[B, ...] of view `number`. Raises OSError."""
        found = np.empty((len(rows), *self._shape[1:]), np.float16)
        with self._path.open("rb", buffering=0) as file:
            for place, row in enumerate(rows.tolist()):
                file.seek(row * _bytes(self._shape) + number * found[0].nbytes)
                if file.readinto(found[place]) != found[place].nbytes:
                    raise OSError(f"{self._path} is shorter than it was")
        return torch.from_numpy(found)


def _drawn(config: RunConfig, seed: int, rows: int) -> tuple[list[ViewParams], Tensor | None]:
    """Of all rows: the random views, and the patches that the encoder sees. Some at a time, since drawing takes more memory."""
    method = METHODS[config.ssl.method]
    views, patches = [], []
    for first in range(0, rows, ROWS_AT_ONCE):
        count, generator = min(ROWS_AT_ONCE, rows - first), torch.Generator().manual_seed(derive(seed, "rows", first))
        views.append(method.draw_views(config, count, generator))
        patches.append(method.draw_kept(config, count, generator))
    visible = [one for one in patches if one is not None]
    return [ViewParams.cat(of_view) for of_view in zip(*views, strict=True)], torch.cat(visible) if visible else None


def _write(path: Path, blocks: Iterable[Tensor], room: float) -> None:
    """As many records as there is room for."""
    temporary = path.with_suffix(UNFINISHED)
    with contextlib.suppress(OSError), temporary.open("wb") as file:
        for block in blocks:
            fit = int((room - file.tell()) // _bytes(tuple(block.shape[1:])))
            file.write(block[: max(0, fit)].cpu().numpy().tobytes())
            if fit < len(block):
                break
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * 2


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
