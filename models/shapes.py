"""Names and shapes of every tensor of a model, computed without torch.

The server's control process checks updates against them, and byte counts read them. All tensors are float32.
Names are timm's (VisionTransformer) for the encoder; ``projector.N`` and ``predictor.N`` for the heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import prod

from lwfed.config import ModelSection, RunConfig
from lwfed.plan import NORM, PREDICTOR, PROJECTOR, STEM

Shape = tuple[int, ...]


def part_shapes(config: RunConfig, part: str) -> dict[str, Shape]:
    """The tensors of `part` (a name of `lwfed.plan`), in the order of the model.

    Raises ValueError when the model has no such part.
    """
    model, ssl = config.model, config.ssl
    if part == STEM:
        return _stem(model)
    if part == NORM:
        return {f"{norm_name(model)}.weight": (model.width,), f"{norm_name(model)}.bias": (model.width,)}
    if part == PROJECTOR:
        return _mlp(PROJECTOR, [model.width, ssl.hidden_dim, ssl.hidden_dim, ssl.output_dim])
    if part == PREDICTOR:
        return _mlp(PREDICTOR, [ssl.output_dim, ssl.hidden_dim, ssl.output_dim])
    number = part.removeprefix("layer.")
    if number == part or not number.isdecimal() or not 1 <= int(number) <= model.depth:
        raise ValueError(f"a model of depth {model.depth} has no part {part!r}")
    return _layer(model, int(number) - 1)


def shapes(config: RunConfig, parts: Iterable[str]) -> dict[str, Shape]:
    """The tensors of several parts, in the order given."""
    return {name: shape for part in parts for name, shape in part_shapes(config, part).items()}


def size_bytes(config: RunConfig, parts: Iterable[str]) -> int:
    """Bytes of the float32 tensors of `parts`, without names and headers."""
    return 4 * sum(prod(shape) for shape in shapes(config, parts).values())


def norm_name(model: ModelSection) -> str:
    """timm's name of the norm after pooling: it depends on the pooling."""
    return "fc_norm" if model.pooling == "mean" else "norm"


def mlp_width(model: ModelSection) -> int:
    """Hidden width of a layer's MLP, rounded down as timm does."""
    return int(model.width * model.mlp_ratio)


def token_count(model: ModelSection) -> int:
    """Tokens per image: one per patch, and the class token where there is one."""
    return (model.image_size // model.patch_size) ** 2 + (model.pooling == "token")


def _stem(model: ModelSection) -> dict[str, Shape]:
    token: dict[str, Shape] = {"cls_token": (1, 1, model.width)} if model.pooling == "token" else {}
    return {
        **token,
        "pos_embed": (1, token_count(model), model.width),
        "patch_embed.proj.weight": (model.width, model.channels, model.patch_size, model.patch_size),
        "patch_embed.proj.bias": (model.width,),
    }


def _layer(model: ModelSection, index: int) -> dict[str, Shape]:
    width, hidden = model.width, mlp_width(model)
    weights: dict[str, Shape] = {
        "norm1": (width,),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "norm2": (width,),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    named: dict[str, Shape] = {}
    for name, shape in weights.items():
        named[f"blocks.{index}.{name}.weight"] = shape
        named[f"blocks.{index}.{name}.bias"] = shape[:1]
    return named


def _mlp(head: str, widths: list[int]) -> dict[str, Shape]:
    """Linear, BatchNorm, ReLU three by three; no bias, and no affine parameters in the last BatchNorm."""
    named: dict[str, Shape] = {}
    for index, (inward, outward) in enumerate(pairwise(widths)):
        named[f"{head}.{3 * index}.weight"] = (outward, inward)
        if index < len(widths) - 2:
            named[f"{head}.{3 * index + 1}.weight"] = (outward,)
            named[f"{head}.{3 * index + 1}.bias"] = (outward,)
    return named
