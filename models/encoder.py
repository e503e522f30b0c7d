"""The encoder F: stem, layers L_1..L_S, pooling and norm, with timm's VisionTransformer names and numerics.

The Vision Transformer of arXiv 2401.11647, section 4.1, without dropout, in plain torch: timm and the torchvision it
imports would cost a device 115 MB. Checkpoints pass between this encoder and timm's with names unchanged
(class_token=False, global_pool="avg" for mean pooling; timm's defaults for the class token).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwfed.config import ModelSection
from lwfed.models.shapes import mlp_width, norm_name, token_count
from lwfed.plan import by_part

EPS = 1e-6  # of every LayerNorm, as timm's
# Pixels in [0, 1] become [-1, 1]. Constants rather than a data set's statistics: no device need share its own.
MEAN, STD = 0.5, 0.5


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
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

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
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """One layer L_k: [B, tokens, width] -> the same shape."""

    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(model.width, eps=EPS)
        self.attn = Attention(model.width, model.heads)
        self.norm2 = nn.LayerNorm(model.width, eps=EPS)
        self.mlp = Mlp(model.width, mlp_width(model))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Encoder(nn.Module):
    """The encoder with its first `layers` layers, 0 <= layers <= depth. Weights are undefined until loaded."""

    cls_token: nn.Parameter | None

    def __init__(self, model: ModelSection, layers: int) -> None:
        super().__init__()
        if not 0 <= layers <= model.depth:
            raise ValueError(f"an encoder of depth {model.depth} cannot have {layers} layers")
        token = nn.Parameter(torch.empty(1, 1, model.width)) if model.pooling == "token" else None
        self.register_parameter("cls_token", token)
        self.pos_embed = nn.Parameter(torch.empty(1, token_count(model), model.width))
        self.patch_embed = PatchEmbed(model)
        self.blocks = nn.ModuleList(Block(model) for _ in range(layers))
        self.norm_name = norm_name(model)
        self.add_module(self.norm_name, nn.LayerNorm(model.width, eps=EPS))

    def prefix(self, images: Tensor, layers: int) -> Tensor:
        """Stem and the first `layers` layers: float32 [B, C, H, W] in [0, 1] -> tokens [B, tokens, width]."""
        tokens: Tensor = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.pos_embed
        for block in self.blocks[:layers]:
            tokens = block(tokens)
        return tokens

    def rest(self, tokens: Tensor, layers: int) -> Tensor:
        """What follows `prefix(images, layers)`: tokens [B, tokens, width] -> features [B, width]."""
        for block in self.blocks[layers:]:
            tokens = block(tokens)
        pooled = tokens.mean(dim=1) if self.cls_token is None else tokens[:, 0]
        out: Tensor = self.get_submodule(self.norm_name)(pooled)
        return out

    def features(self, images: Tensor) -> Tensor:
        """Pooled and normed: float32 [B, C, H, W] in [0, 1] -> [B, width]."""
        return self.rest(self.prefix(images, 0), 0)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def load_encoder(model: ModelSection, tensors: Mapping[str, Tensor]) -> Encoder:
    """The encoder that `tensors` hold, heads ignored; it shares their memory and takes no gradients.

    Raises RuntimeError that names what is missing or of another shape.
    """
    with torch.device("meta"):  # no memory, and no draw from the global generator, for weights that are replaced at once
        encoder = Encoder(model, layer_count(tensors))
    wanted = encoder.state_dict().keys()
    encoder.load_state_dict({name: tensor for name, tensor in tensors.items() if name in wanted}, assign=True)
    return encoder.requires_grad_(False)


def layer_count(tensors: Mapping[str, Tensor]) -> int:
    """How many layers `tensors` hold."""
    return sum(part.startswith("layer.") for part in by_part(tensors))
