"""One optimiser step (arXiv 2401.11647, Algorithm 2), with the same gradients at any micro-batch.

The frozen prefix runs once per view, without gradients, and what it gives serves all branches: online, target, and for
alignment the received and the previous model. What is frozen is decided before the forward pass; gradients dropped
afterwards would save nothing.

Heads and loss need the full batch (BatchNorm, negatives), prefix and layers do not. With a micro-batch the representations
of the whole batch are computed piece by piece without a graph; heads and loss give the gradient with respect to them; and
each piece is run forward once more, to take its share of that gradient back through the layers. The activations of one
piece are all that is held: the price is one more forward pass of the trained layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.config.schema import AlignmentSection
from lwfed.models.allocator import give_back
from lwfed.models.ema import Target, branch
from lwfed.models.encoder import Encoder, freeze
from lwfed.models.heads import load_network
from lwfed.models.optimiser import AdamW
from lwfed.models.prefix import KEPT_AS, Prefix, TorchPrefix
from lwfed.models.ssl import METHODS, alignment
from lwfed.models.views import ViewParams, augment
from lwfed.plan import STEM, in_model_order, part_of
from lwfed.seeds import derive


@dataclass(frozen=True)
class Means:
    """How steps are computed, which changes them by no more than rounding; int8 layers apart."""

    prefix: Prefix | None = None  # runs the frozen layers; None: torch does
    micro_batch: int | None = None  # images at a time through all layers; None: the whole batch


AT_ONCE = Means()


@dataclass(frozen=True)
class Branches:
    """What one local call holds; `prefix` is None when nothing is frozen, not even the stem."""

    online: Encoder
    target: Target | None
    received: Encoder | None  # for alignment
    previous: Encoder | None  # for alignment by moon, where this place has trained the stage before
    anchors: list[Tensor]  # the weights received, for the proximal term; empty without
    optimiser: AdamW
    trained: list[Tensor]
    prefix: Prefix | None
    prefix_layers: int
    micro_batch: int | None


@dataclass(frozen=True)
class Batch:
    """Images, and every random draw of the step, made before anything is computed. Views are made when they are needed."""

    images: Tensor  # uint8 [B, C, H, W], B >= 2
    views: tuple[ViewParams, ...]
    keep: Tensor | None = None  # int64 [B, visible]: patches that the encoder sees; None: all
    skip: Collection[int] = frozenset()  # frozen layers (0-based) that this step does without
    tokens: tuple[Tensor, ...] | None = None  # of each view, what the first `passed` frozen layers give; None: to be made
    passed: int = 0

    def view(self, number: int, rows: slice) -> Tensor:
        """View `number` of some images: float32 [rows, C, H, W] in [0, 1]."""
        return augment(self.images[rows], self.views[number][rows], self.images.shape[3])


@dataclass(frozen=True)
class Terms:
    """What a local call adds to the loss of the method."""

    alignment: AlignmentSection | None = None
    proximal: float = 0.0


METHOD_ALONE = Terms()
# Views made at a time, also where fewer go through the layers: hardly faster with more, much slower with few. Transforms hold
# several times what they give, so of large images fewer.
VIEWS_AT_ONCE, VIEW_BYTES_AT_ONCE = 64, 4e6


def views_at_once(micro_batch: int, image_bytes: float) -> int:
    """How many views of `image_bytes` in float32 are made at a time for micro-batches: of several of these, all."""
    wanted = min(VIEWS_AT_ONCE, int(VIEW_BYTES_AT_ONCE // image_bytes))
    return micro_batch * max(1, -(-wanted // micro_batch))


def prepare(
    config: RunConfig,
    tensors: Mapping[str, Tensor],
    trained: Iterable[str],
    terms: Terms = METHOD_ALONE,
    previous: Mapping[str, Tensor] | None = None,
    means: Means = AT_ONCE,
) -> Branches:
    """The branches for training the parts `trained` of the model that `tensors` hold; `previous` is what a local call gave before.

    Trained and previous tensors are copied, frozen ones shared. Raises ValueError when something frozen follows something trained.
    """
    active = set(trained)
    layers = prefix_layers({part_of(name) for name in tensors}, active)
    online = load_network(config, {name: tensor.clone() if part_of(name) in active else tensor for name, tensor in tensors.items()})
    freeze(online, active)
    optimised = {name: tensor for name, tensor in online.named_parameters() if tensor.requires_grad}
    aligned = terms.alignment is not None and terms.alignment.method != "off"
    before = None
    if aligned and terms.alignment is not None and terms.alignment.method == "moon" and previous:
        before = load_network(config, {**tensors, **{name: tensor.clone() for name, tensor in previous.items()}})
        freeze(before, active)
        before.requires_grad_(False)
    return Branches(
        online=online,
        target=Target(online) if METHODS[config.ssl.method].has_target else None,
        received=branch(online) if aligned else None,
        previous=before,
        anchors=[tensors[name] for name in optimised] if terms.proximal else [],
        optimiser=AdamW(optimised, config.train.weight_decay),
        trained=list(optimised.values()),
        prefix=None if layers is None else means.prefix or TorchPrefix(online, layers),
        prefix_layers=layers or 0,
        micro_batch=means.micro_batch,
    )


def prefix_layers(present: set[str], trained: set[str]) -> int | None:
    """Layers of the frozen prefix; None without one. Raises ValueError when the frozen parts are not the first of the model."""
    order = in_model_order(present)
    frozen = [part for part in order if part not in trained]
    if not trained or trained - present or frozen != list(order[: len(frozen)]):
        raise ValueError(f"parts {sorted(trained)} cannot be trained: they must be the last of {list(order)}, and at least one")
    return sum(part.startswith("layer.") for part in frozen) if STEM in frozen else None


def draw_batch(config: RunConfig, seed: int, step: int, images: Tensor, prefix_layers: int) -> Batch:
    """The random draws for uint8 images [B, C, H, W] of step number `step` (0-based) of a local call."""
    method, count = METHODS[config.ssl.method], len(images)

    def stream(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive(seed, purpose, step))

    views = tuple(params.to(images.device) for params in method.draw_views(config, count, stream("views")))
    keep = method.draw_kept(config, count, stream("patches"))
    skipped = torch.rand(prefix_layers, generator=stream("depth")) < config.stages.depth_dropout
    return Batch(images, views, None if keep is None else keep.to(images.device), frozenset(skipped.nonzero().flatten().tolist()))


def train_step(branches: Branches, batch: Batch, lr: float, config: RunConfig, terms: Terms = METHOD_ALONE) -> float:
    """One step; returns the loss before it. A loss that is not finite is returned without a step."""
    value = backward(branches, batch, config, terms)
    if math.isfinite(value):
        if branches.anchors:  # FedProx: the gradient of mu / 2 |w - w_received|^2
            gradients = [tensor.grad for tensor in branches.trained if tensor.grad is not None]
            torch._foreach_add_(gradients, torch._foreach_sub(branches.trained, branches.anchors), alpha=terms.proximal)
        branches.optimiser.step(lr)
        if branches.target is not None:
            branches.target.update(config.ssl.momentum)
    give_back()
    return value


def backward(branches: Branches, batch: Batch, config: RunConfig, terms: Terms = METHOD_ALONE) -> float:
    """The loss; and its gradients, left on the trained tensors where it is finite."""
    method, online = METHODS[config.ssl.method], branches.online
    run = _Run(branches, batch, config)
    views = [View(number, run.frozen(number)) for number in range(len(batch.views))]
    with torch.no_grad():
        keys = [] if branches.target is None else [run.key(branches.target.network, view) for view in views]
    whole = run.pieces == 1
    found = [run.represent(view, graph=whole) for view in views]
    projected = [method.project(online, one) for one in found]
    loss = method.loss(online, found, projected, keys, config.ssl)
    if branches.received is not None and terms.alignment is not None:
        loss = loss + _alignment(branches, run, views[0], projected[0], terms.alignment)
    value = loss.item()
    if math.isfinite(value):
        loss.backward()  # type: ignore[no-untyped-call]
        if not whole:
            give_back()
            for view, one in zip(views, found, strict=True):
                run.take_back(view, one.grad)
    return value


def frozen_tokens(branches: Branches, batch: Batch, config: RunConfig, number: int) -> Tensor:
    """What the frozen prefix gives for view `number` of `batch` [B, ...]. Raises ValueError where nothing is frozen."""
    found = _Run(branches, batch, config).frozen(number)
    if found is None:
        raise ValueError("nothing is frozen")
    return found


@dataclass(frozen=True)
class Kept:
    """Of one image, until it has been taken back."""

    tokens: tuple[int, ...] | None  # shape of what the frozen prefix gives for a view; None without one
    layers: float  # bytes that a graph through the trained layers holds, of a view, beside its tokens
    widest: float  # of its largest tensor
    heads: float  # bytes that one through heads and loss holds, of all views


def kept_for_backward(branches: Branches, batch: Batch, config: RunConfig) -> Kept:
    """Measured by the graphs of one view of `batch`."""
    run, method, online = _Run(branches, batch, config), METHODS[config.ssl.method], branches.online
    view = View(0, run.frozen(0))
    given = () if view.tokens is None else (view.tokens,)
    found, layers = _graph_bytes((*online.parameters(), *given), lambda: run.represent(view, graph=True))
    views = [found.detach().clone().requires_grad_() for _ in batch.views]

    def loss() -> Tensor:
        projected = [method.project(online, one) for one in views]
        return method.loss(online, views, projected, [one.detach() for one in projected], config.ssl)

    _, heads = _graph_bytes(online.parameters(), loss)
    shape, count = None if view.tokens is None else tuple(view.tokens.shape[1:]), len(batch.images)
    return Kept(shape, sum(layers) / count, max(layers, default=0) / count, sum(heads) / count)


def _graph_bytes(given: Iterable[Tensor], forward: Callable[[], Tensor]) -> tuple[Tensor, list[int]]:
    """What `forward` gives, and the bytes of each tensor that its graph holds beside those that were `given`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in given}
    held: list[int] = []

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(storage.nbytes())
        return tensor.detach()  # with its graph, an output that its own operation keeps would never be let go

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        return forward(), held


@dataclass(frozen=True)
class View:
    number: int
    tokens: Tensor | None  # what the frozen prefix gives for the whole batch; None where nothing is frozen


def _alignment(branches: Branches, run: _Run, view: View, z: Tensor, section: AlignmentSection) -> Tensor:
    assert branches.received is not None
    with torch.no_grad():
        z_global = run.key(branches.received, view)
        z_previous = None if branches.previous is None else run.key(branches.previous, view)
    if section.method == "cosine":
        return section.alpha * alignment.cosine(z, z_global)
    # Without a previous model MOON compares with the received one twice: a constant.
    return section.alpha * alignment.moon(z, z_global, z_global if z_previous is None else z_previous, section.temperature)


class _Run:
    """Forward passes of one batch, in pieces of the micro-batch."""

    def __init__(self, branches: Branches, batch: Batch, config: RunConfig) -> None:
        self._online, self._batch = branches.online, batch
        self._prefix, self._layers = branches.prefix, branches.prefix_layers
        self._method = METHODS[config.ssl.method]
        self._count = len(batch.images)
        self._size = min(branches.micro_batch or self._count, self._count)
        self._dtype = next(branches.online.parameters()).dtype  # of all that leaves mixed precision
        self._bf16 = config.train.precision == "bf16"
        self._made: tuple[tuple[int, int], Tensor] | None = None  # the views made last, and which

    @property
    def pieces(self) -> int:
        return -(-self._count // self._size)

    @torch.no_grad()
    def frozen(self, number: int) -> Tensor | None:
        """What the prefix gives for view `number`; None where nothing is frozen."""
        prefix, known, passed = self._prefix, self._batch.tokens, self._batch.passed
        if prefix is None:
            return None
        if known is not None and passed == self._layers:
            return known[number]

        def tokens(rows: slice) -> Tensor:
            with self._mixed():
                if known is None:
                    return prefix(self._stem(self._online, number, rows), self._batch.skip)
                return prefix(known[number][rows].to(self._dtype), {*self._batch.skip, *range(passed)})

        return self._cat(tokens, KEPT_AS.get(prefix.engine, self._dtype))

    def key(self, network: Encoder, view: View) -> Tensor:
        """z [B, D] of a branch that takes no gradients."""

        def features(rows: slice) -> Tensor:
            with self._mixed():
                return network.pool(self._through(network, view, rows))

        return self._method.key(network, self._cat(features, self._dtype))

    def represent(self, view: View, graph: bool) -> Tensor:
        """Representations [B, ...] of the online branch: with the graph that made them, or as a leaf that collects their gradient."""
        if graph:
            return self._represent(view, slice(None))
        with torch.no_grad():
            found = self._cat(lambda rows: self._represent(view, rows), self._dtype)
        return found.requires_grad_()

    def take_back(self, view: View, gradient: Tensor | None) -> None:
        """Take the gradient [B, ...] of the representations back through the layers, piece by piece."""
        assert gradient is not None
        for rows in self._rows():
            # Backward from a scalar: from a tensor, given its gradient, torch imports sympy, which takes 35 MB.
            (self._represent(view, rows) * gradient[rows]).sum().backward()  # type: ignore[no-untyped-call]
        give_back()

    def _represent(self, view: View, rows: slice) -> Tensor:
        with self._mixed():
            pixels = self._pixels(view.number, rows) if self._method.sees_pixels else None
            x = self._through(self._online, view, rows, pixels)
            found = self._method.represent(self._online, x, pixels, self._keep(rows))
        return found.to(self._dtype)

    def _mixed(self) -> torch.autocast:
        """Mixed precision, of everything but heads and loss. A new context each time: one that is entered twice never ends."""
        return torch.autocast(self._online.device.type, torch.bfloat16, enabled=self._bf16)

    def _through(self, network: Encoder, view: View, rows: slice, pixels: Tensor | None = None) -> Tensor:
        """What the last layer gives; `pixels` where they have been made already."""
        if view.tokens is None:
            return network.through(self._stem(network, view.number, rows, pixels))
        return network.through(view.tokens[rows].to(self._dtype), self._layers)

    def _stem(self, network: Encoder, number: int, rows: slice, pixels: Tensor | None = None) -> Tensor:
        return network.stem(self._pixels(number, rows) if pixels is None else pixels, self._keep(rows))

    def _pixels(self, number: int, rows: slice) -> Tensor:
        if self.pieces == 1:
            return self._view(number, rows)
        block = views_at_once(self._size, 4 * self._batch.images[0].numel())
        first = rows.start // block * block
        if self._made is None or self._made[0] != (number, first):
            self._made = (number, first), self._view(number, slice(first, first + block))
        return self._made[1][rows.start - first : rows.stop - first]

    def _view(self, number: int, rows: slice) -> Tensor:
        with torch.autocast(self._online.device.type, enabled=False):
            return self._batch.view(number, rows).to(self._dtype)

    def _keep(self, rows: slice) -> Tensor | None:
        return None if self._batch.keep is None else self._batch.keep[rows]

    def _cat(self, one: Callable[[slice], Tensor], dtype: torch.dtype) -> Tensor:
        """The pieces in one tensor that is made before them, so that it does not lie between what they leave behind."""
        found: Tensor | None = None
        for rows in self._rows():
            piece = one(rows).to(dtype)
            if len(piece) == self._count:
                return piece
            if found is None:
                found = piece.new_empty(self._count, *piece.shape[1:])
            found[rows] = piece
        assert found is not None
        give_back()
        return found

    def _rows(self) -> Iterator[slice]:
        for first in range(0, self._count, self._size):
            yield slice(first, first + self._size)
