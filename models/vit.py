"""The Vision Transformer of arXiv 2401.11647, section 4.1, without dropout, with timm's names and numerics.

In plain torch: timm and the torchvision it imports would cost a device 115 MB. Checkpoints pass between this encoder and
timm's VisionTransformer with names unchanged (class_token=False, global_pool="avg" for mean pooling; timm's defaults
for the class token).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwfed.config import ModelSection
from lwfed.models.encoder import MEAN, STD, Encoder
from lwfed.models.kernels import Linear

EPS = 1e-6  # of every LayerNorm, as timm's


class PatchEmbed(nn.Module):
    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.proj = nn.Conv2d(model.channels, model.width, model.patch_size, model.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj((images - MEAN) / STD)  # [B, width, H / patch, W / patch]
        return patches.flatten(2).transpose(1, 2)  # [B, patches, width]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, tokens, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.proj(mixed)
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """One layer L_k: [B, tokens, width] -> the same shape."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(Encoder):
    """With its first `layers` layers, 0 <= layers <= depth."""

    cls_token: nn.Parameter | None

    def __init__(self, model: ModelSection, layers: int) -> None:
        super().__init__()
        if not 0 <= layers <= model.depth:
            raise ValueError(f"an encoder of depth {model.depth} cannot have {layers} layers")
        by_token = model.pooling == "token"
        patches = (model.image_size // model.patch_size) ** 2
        self.register_parameter("cls_token", nn.Parameter(torch.empty(1, 1, model.width)) if by_token else None)
        self.pos_embed = nn.Parameter(torch.empty(1, patches + by_token, model.width))
        self.patch_embed = PatchEmbed(model)
        hidden = int(model.width * model.mlp_ratio)  # rounded down as timm does
        self.blocks = nn.ModuleList(Block(model.width, model.heads, hidden) for _ in range(layers))
        self.norm_name = "norm" if by_token else "fc_norm"  # timm's names
        self.add_module(self.norm_name, nn.LayerNorm(model.width, eps=EPS))

    def stem(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """The class token, where there is one, is always kept."""
        patches: Tensor = self.patch_embed(images)
        extra = 0 if self.cls_token is None else 1
        tokens = patches + self.pos_embed[:, extra:]
        if keep is not None:
            tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        if self.cls_token is None:
            return tokens
        token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([token.expand(len(tokens), -1, -1), tokens], dim=1)

    def layers(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def pool(self, x: Tensor) -> Tensor:
        return self.final_norm(x.mean(dim=1) if self.cls_token is None else x[:, 0])

    def final_norm(self, x: Tensor) -> Tensor:
        """Over the last dimension, of features or of tokens."""
        out: Tensor = self.get_submodule(self.norm_name)(x)
        return out
