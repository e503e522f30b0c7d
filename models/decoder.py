"""The light decoder of a masked autoencoder (He et al., arXiv 2111.06377), the head of `ssl.method: mae`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from lwfed.config import ModelSection
from lwfed.config.schema import SslSection
from lwfed.models.vit import EPS, Block

HEAD_WIDTH = 32  # of an attention head


class Decoder(nn.Module):
    """Paints the pixels of all patches from the tokens of the visible ones."""

    def __init__(self, model: ModelSection, ssl: SslSection) -> None:
        super().__init__()
        width = ssl.decoder_width
        self.side = model.image_size // model.patch_size  # patches
        self.embed = nn.Linear(model.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, width // HEAD_WIDTH, 4 * width) for _ in range(ssl.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pixels = nn.Linear(width, model.channels * model.patch_size**2)

    def forward(self, visible: Tensor, keep: Tensor) -> Tensor:
        """Patch tokens [B, visible, width] and their places [B, visible] -> pixels [B, patches, C * patch * patch]."""
        known = self.embed(visible)
        places = keep[:, :, None].expand(-1, -1, known.shape[2])
        tokens = self.mask_token.to(known.dtype).expand(len(known), self.side**2, -1).scatter(1, places, known)
        tokens = tokens + positions(self.side, known.shape[2]).to(known)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.pixels(self.norm(tokens))
        return out


@lru_cache(maxsize=4)
def positions(side: int, width: int) -> Tensor:
    """Fixed embedding [side * side, width] of places on a square grid: sines and cosines of row and column (section A.1 there)."""
    rates = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * rates  # [side, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # [side, width / 2]
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)
