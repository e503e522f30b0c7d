"""Views that are used again, and what the frozen prefix makes of them: `train.views_per_round`.

Each image has k pairs of views. A step draws for each image one of its first views and one of its second ones, so that k
pairs give k * k combinations. Their tokens are computed once, in the order of the images and not in that of the steps, and
kept (`lwfed.models.features`) as rows of each pair and image in turn, under

    <views>-<engine>-<micro-batch>-<machine>-<prefix>

`views` names all that tokens depend on but the weights and how they are computed, `prefix` the weights. At a stage whose
prefix is that of what is kept and more layers, the tokens go through these layers only. Tokens are rounded to what is kept
where a stage ends, also where they are computed from pixels, so that they do not depend on which way they came; for the
same reason those of another engine or micro-batch are no beginning. What has no room is computed again in each step; what has been
damaged once more, with all that it was computed with, since the scales of int8 are those of a micro-batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.console import counted
from lwfed.models.features import CHECKSUM_BYTES, Layout, Place, read, sealed, unsealed
from lwfed.models.ssl import METHODS
from lwfed.models.step import Batch, Branches, frozen_tokens
from lwfed.models.views import ViewParams
from lwfed.plan import StagePlan
from lwfed.seeds import derive

ROWS_AT_ONCE = 512

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
    """Keeps the tokens of one device, of one stage or round at a time."""

    place: Place
    parts: tuple[str, ...]  # digests of the frozen parts, in model order
    tell: Callable[[str], None] = lambda text: None  # for people: why tokens are computed anew that could have been kept

    def prefixes(self) -> list[str]:
        """Names of all that the prefix begins with, the stem alone first, and of itself."""
        return [_digest(chain) for chain in accumulate(self.parts)]


class Views:
    """Those of one local call on `count` images."""

    def __init__(self, config: RunConfig, reuse: Reuse, branches: Branches, count: int, choose: Choose) -> None:
        self._config, self._reuse, self._branches = config, reuse, branches
        self._count, self._rows, self._choose = count, reuse.pairs * count, choose
        self._views, self._patches = _drawn(config, reuse.seed, self._rows)
        self._layouts = self._measured()
        self._kept: _Kept | None = None
        self._tell: Callable[[str], None] = lambda text: None
        self._damaged = False  # some of what was kept, and that was said

    def keep(self, cache: FeatureCache, images: str, on_rows: Progress | None = None) -> None:
        """Take the tokens from `cache`, where they are put first if they are not there. `images` names the images."""
        place, views, how, self._tell = cache.place, self._name(images), self._how(), cache.tell
        names = [f"{views}-{how}-{prefix}" for prefix in cache.prefixes()]
        with self._told(cache):
            room, all_bytes = place.room(), self._rows * self._row_bytes
            held = place.size(names[-1])
            if held is None or held < all_bytes <= room + held:  # cut short where there is room now
                earlier = [(layers, names[layers]) for layers in self._reuse.rounded_after[:-1]]
                passed, source = next(((layers, name) for layers, name in reversed(earlier) if place.size(name) is not None), (0, None))
                if held is None and source is None:
                    self._say_why(cache, views, how)
                if room < all_bytes:
                    place.forget()
                    room, source = place.room(), None
                below = self._kept_in(place, source, passed) if source else None
                place.write(names[-1], self._blocks(passed, below, on_rows), room)
                self._say_how_few(cache, place.size(names[-1]) or 0)
            place.forget(but=names[-1])
            self._kept = self._kept_in(place, names[-1], self._reuse.rounded_after[-1])

    def batch(self, seed: int, step: int, indices: Tensor) -> Batch:
        """Step number `step` (0-based) of the local call of that seed, on the images `indices` [B]."""
        generator = torch.Generator().manual_seed(derive(seed, "pairs", step))
        pairs = torch.randint(self._reuse.pairs, (len(self._views), len(indices)), generator=generator)
        rows = list(pairs * self._count + indices)
        return self._batch(rows, tuple(self._layout.decode(self._tokens(number, one)) for number, one in enumerate(rows)))

    def _name(self, images: str) -> str:
        config = self._config
        drawn = [self._reuse.pairs, self._reuse.seed, images, config.views.model_dump(mode="json")]
        masked = None if self._patches is None else config.ssl.mask_ratio
        model, kept_as = config.model.model_dump(mode="json"), config.train.features_as
        return _digest(json.dumps([model, config.ssl.method, masked, kept_as, *drawn]))

    def _how(self) -> str:
        """Names the way of computing, by which bits differ."""
        prefix, train = self._branches.prefix, self._config.train
        assert prefix is not None
        machine = [torch.__version__, prefix.runtime, torch.backends.cpu.get_cpu_capability(), self._branches.online.device.type]
        rest = _digest(json.dumps([train.batch_size, train.precision, train.threads, *machine]))
        return f"{prefix.engine}-{self._branches.micro_batch or train.batch_size}-{rest}"

    @property
    def _row_bytes(self) -> int:
        """Of one pair of views of one image."""
        return len(self._views) * self._layout.kept_bytes

    @property
    def _at_once(self) -> int:
        """Rows that are computed together."""
        return min(ROWS_AT_ONCE, self._config.train.batch_size)

    @contextlib.contextmanager
    def _told(self, cache: FeatureCache) -> Iterator[None]:
        """A place that cannot be used costs time only."""
        try:
            yield
        except OSError as error:
            cache.tell(f"features of views that are used again cannot be kept ({error.strerror or error}): they are computed each time")

    def _say_how_few(self, cache: FeatureCache, held: int) -> None:
        if (kept := held // self._row_bytes) < self._rows:
            wanted, allowed = self._rows * self._row_bytes, self._config.train.features_mb
            one_more = (kept + 1) * self._row_bytes  # what limits is what this exceeds
            way = cache.place.remedy(one_more)
            if one_more > allowed * 1e6:
                way = f"raise train.features_mb from {allowed} to {math.ceil(wanted / 1e6)}"
            cache.tell(
                f"features of views that are used again take {wanted / 1e6:.0f} MB, for which there is no room: those of "
                f"{self._rows - kept} of {self._rows} pairs are computed each time; {way}"
            )

    def _say_why(self, cache: FeatureCache, views: str, how: str) -> None:
        """That tokens begin with pixels, where others have gone through some of these layers."""
        ours = {name.split("-")[-1]: name.split("-") for name in cache.place.names() if name.startswith(f"{views}-")}
        before = next((ours[prefix] for prefix in reversed(cache.prefixes()) if prefix in ours), None)
        if before is None:
            return
        was, is_now = (f"{engine} with {counted(int(size), 'image')} at a time" for engine, size in (before[1:3], how.split("-")[:2]))
        other = "of another version or setting" if was == is_now else f"and not by {is_now}"
        cache.tell(f"features of views that are used again are computed anew: those kept are by {was}, {other}, which rounds otherwise")

    def _say_damaged(self) -> None:
        """Once."""
        if self._damaged:
            return
        self._damaged = True
        self._tell("features of views that are used again have been damaged: they are computed anew; check the disk of the state directory")

    def _blocks(self, passed: int, below: _Kept | None, on_rows: Progress | None) -> Iterator[Tensor]:
        """uint8 [rows, bytes] of all rows, some at a time; those in `below` have passed so many layers already."""
        if on_rows:
            on_rows(0, self._rows)
        for first in range(0, self._rows, self._at_once):
            yield self._block(first, passed, below)
            if on_rows:
                on_rows(min(first + self._at_once, self._rows), self._rows)

    def _block(self, first: int, passed: int = 0, below: _Kept | None = None) -> Tensor:
        rows = torch.arange(first, min(first + self._at_once, self._rows))
        views = range(len(self._views))
        return torch.cat([sealed(self._computed(number, rows, self._whole(below, number, rows), passed)) for number in views], 1)

    def _whole(self, below: _Kept | None, number: int, rows: Tensor) -> Tensor | None:
        """uint8 [B, bytes] of view `number`; None where not all rows are there as they were written."""
        if below is None or int(rows[-1]) >= below.rows:
            return None
        try:
            known, intact = below.read(number, rows)
        except OSError:
            return None
        if intact.all():
            return known
        self._say_damaged()
        return None

    def _tokens(self, number: int, rows: Tensor) -> Tensor:
        """uint8 [B, bytes] of view `number`."""
        if self._kept is None:
            return self._computed(number, rows)
        kept = rows < self._kept.rows
        try:
            known = self._mended(self._kept, number, rows[kept]).to(self._branches.online.device)
        except OSError:  # the file has gone, or the disk is bad
            self._kept = None
            return self._computed(number, rows)
        if kept.all():
            return known
        rest = self._computed(number, rows[~kept])
        found = rest.new_empty(len(rows), rest.shape[1])
        found[kept], found[~kept] = known, rest
        return found

    def _mended(self, kept: _Kept, number: int, rows: Tensor) -> Tensor:
        """uint8 [B, bytes] of view `number`; what is damaged is computed anew, and put right. Raises OSError."""
        found, intact = kept.read(number, rows)
        if intact.all():
            return found
        self._say_damaged()
        for first in {row - row % self._at_once for row in rows[~intact].tolist()}:
            block = self._block(first)
            kept.mend(first, block)
            mine = (rows >= first) & (rows < first + len(block))
            found[mine] = kept.of_view(number, block)[rows[mine] - first]
        return found

    def _computed(self, number: int, rows: Tensor, known: Tensor | None = None, passed: int = 0) -> Tensor:
        """uint8 [B, bytes] of view `number`, from what the first `passed` layers have given, or from pixels."""
        for last in self._reuse.rounded_after:
            if known is None or last > passed:
                tokens = None if known is None else self._layouts[passed].decode(known)
                known, passed = self._layouts[last].encode(self._through(number, rows, tokens, passed, last)), last
        assert known is not None
        return known

    def _through(self, number: int, rows: Tensor, tokens: Tensor | None, passed: int, last: int) -> Tensor:
        """What layer `last` gives for view `number`, from `tokens` that have passed so many layers, or from pixels."""
        count, layers = len(self._views), self._reuse.rounded_after[-1]
        batch = self._batch([rows] * count, None if tokens is None else (tokens,) * count, passed, range(last, layers))
        return frozen_tokens(self._branches, batch, self._config, number)

    def _measured(self) -> dict[int, Layout]:
        """Of what is kept after each number of layers, by the tokens of one image."""
        found: dict[int, Layout] = {}
        tokens, passed = None, 0
        for last in self._reuse.rounded_after:
            tokens, passed = self._through(0, torch.zeros(1, dtype=torch.long), tokens, passed, last), last
            found[last] = Layout(tuple(tokens.shape[1:]), self._config.train.features_as)
        return found

    def _kept_in(self, place: Place, name: str, layers: int) -> _Kept:
        return _Kept(place, name, self._layouts[layers].kept_bytes, len(self._views))

    @property
    def _layout(self) -> Layout:
        return self._layouts[self._reuse.rounded_after[-1]]

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


@dataclass(frozen=True)
class _Kept:
    """Rows that are kept; as many as there was room for."""

    place: Place
    name: str
    view_bytes: int
    views: int

    @property
    def rows(self) -> int:
        return (self.place.size(self.name) or 0) // (self.views * self.view_bytes)

    def read(self, number: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, bytes] of view `number`, and bool [B]: which rows are as they were written. Raises OSError."""
        return unsealed(read(self.place, self.name, rows, self.views * self.view_bytes, self._bytes(number)))

    def mend(self, first: int, block: Tensor) -> None:
        """Put `block` [rows, bytes] in the place of the rows from `first` on. Raises OSError."""
        self.place.mend(self.name, first * self.views * self.view_bytes, block[: self.rows - first])

    def of_view(self, number: int, block: Tensor) -> Tensor:
        """uint8 [rows, bytes] of view `number`."""
        return block[:, self._bytes(number)][:, :-CHECKSUM_BYTES]

    def _bytes(self, number: int) -> slice:
        return slice(number * self.view_bytes, (number + 1) * self.view_bytes)


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
