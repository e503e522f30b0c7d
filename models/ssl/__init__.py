"""What is learnt from unlabelled images. A method is a file with a `loss`, and a line here."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lwfed.config.schema import SslSection
from lwfed.models.ssl import moco_v3
from lwfed.models.ssl.moco_v3 import Pair


class Loss(Protocol):
    def __call__(self, queries: Pair, keys: Pair, ssl: SslSection) -> Tensor:
        """Scalar loss of P(H(F(x1))), P(H(F(x2))) against the target's H(F(x1)), H(F(x2)); each [B, output_dim]."""


LOSSES: dict[str, Loss] = {"moco_v3": moco_v3.loss}
