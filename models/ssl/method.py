"""What an SSL method is: the seam between the local step and the losses.

A step asks the method for a representation of each sample, computed sample by sample so that it may be done in pieces,
then for a projection of it and for the loss, both over the full batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lwfed.config import RunConfig
from lwfed.config.schema import SslSection
from lwfed.models.encoder import Encoder
from lwfed.models.heads import project
from lwfed.models.views import ViewParams, draw


class Method(ABC):
    """A method of two views whose representation is the encoder's features. Methods override what is different."""

    view_count = 2
    has_target = False  # whether keys of a target branch are compared with
    matrices = 0  # of [B, B] in float32 that the loss holds at most, on its way back
    sees_pixels = False  # whether a representation depends on the view beyond what the encoder makes of it

    def draw_views(self, config: RunConfig, count: int, generator: torch.Generator) -> tuple[ViewParams, ...]:
        """The random views of `count` images."""
        size = config.model.image_size
        return tuple(draw(config.views, view, count, size, generator) for view in (0, 1))

    def draw_kept(self, config: RunConfig, count: int, generator: torch.Generator) -> Tensor | None:
        """Which patches the encoder sees, int64 [count, visible], ascending; None: all."""
        return None

    def represent(self, network: Encoder, x: Tensor, view: Tensor | None, keep: Tensor | None) -> Tensor:
        """What the last layer gave, with the view that went in if the method sees it -> [B, ...], row i from sample i alone."""
        return network.pool(x)

    def project(self, network: Encoder, found: Tensor) -> Tensor:
        """A representation -> z [B, D], the space in which branches are compared."""
        return project(network, found)

    def key(self, network: Encoder, features: Tensor) -> Tensor:
        """Features [B, width] of another branch -> its z [B, D]."""
        return project(network, features)

    @abstractmethod
    def loss(
        self, network: Encoder, found: Sequence[Tensor], projected: Sequence[Tensor], keys: Sequence[Tensor], ssl: SslSection
    ) -> Tensor:
        """Scalar loss of a batch, from representations and projections of its views and the target branch's projections."""
