"""Weights at the beginning, each part from a random stream of its own.

So they depend on the run's seed and the part alone: not on the stage in which a part appears, nor on who creates it.
Encoders as timm's: for a Vision Transformer truncated normal (std 0.02) linear weights and position embedding, the patch
projection as torch's Conv2d (uniform in +-1/sqrt(fan in)); for convolutional backbones normal with variance 2 / fan out, and
0 for the scale of the last norm of a ResNet's block (arXiv 1706.02677, section 5.1). Projector, predictor and adapters as
torch's Linear, the decoder as the encoder's layers. Zero biases. How L_s begins is not stated in arXiv 2401.11647;
`stages.layer_init` offers both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import ModelSection, RunConfig
from lwfed.models.encoder import layer_count
from lwfed.models.shapes import Shape, part_shapes
from lwfed.plan import PREDICTOR, PROJECTOR, STEM, StagePlan, by_part, layer, part_of
from lwfed.seeds import derive


def init_part(config: RunConfig, part: str) -> dict[str, Tensor]:
    """Initial tensors of one part, float32 on the CPU; raises ValueError when the model has no such part."""
    generator = torch.Generator().manual_seed(derive(config.run.seed, "init", part))
    return {name: _initial(config.model, name, shape, generator) for name, shape in part_shapes(config, part).items()}


def init_parts(config: RunConfig, parts: Iterable[str]) -> dict[str, Tensor]:
    """Initial tensors of several parts."""
    return {name: tensor for part in parts for name, tensor in init_part(config, part).items()}


def copy_layer(tensors: Mapping[str, Tensor], source: int, target: int) -> dict[str, Tensor]:
    """The weights of layer `source` (1-based) under the names of layer `target`, in memory of their own."""
    old, new = f"blocks.{source - 1}.", f"blocks.{target - 1}."
    return {new + name.removeprefix(old): tensor.clone() for name, tensor in by_part(tensors)[layer(source)].items()}


def grow(config: RunConfig, plan: StagePlan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Initial tensors of the parts that `plan` adds to a model of `tensors` (empty in stage 1).

    With `layer_init: copy` each new layer is a copy of the highest layer of `tensors`; where there is none, it is random.
    """
    below = layer_count(tensors)
    if config.stages.layer_init == "random" or below == 0:
        return init_parts(config, plan.added)
    added: dict[str, Tensor] = {}
    for part in plan.added:
        is_layer = part.startswith("layer.")
        added |= copy_layer(tensors, below, int(part.removeprefix("layer."))) if is_layer else init_part(config, part)
    return added


def _initial(model: ModelSection, name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    tensor = torch.empty(shape)
    if name.startswith("patch_embed."):
        bound = (model.channels * model.patch_size**2) ** -0.5
        return tensor.uniform_(-bound, bound, generator=generator)
    if len(shape) == 1:
        return tensor.fill_(0.0 if name.endswith(("bias", "running_mean")) or _is_last_norm(model, name) else 1.0)
    if name == "cls_token":
        return tensor.normal_(std=1e-6, generator=generator)
    if len(shape) == 4:
        depthwise = shape[1] == 1 and part_of(name) != STEM  # in the stem, one input channel is a grey image
        fan_out = shape[2] * shape[3] * (1 if depthwise else shape[0])
        return tensor.normal_(std=(2 / fan_out) ** 0.5, generator=generator)
    if name.startswith((PROJECTOR, PREDICTOR, "adapter.")):
        return tensor.uniform_(-(shape[1] ** -0.5), shape[1] ** -0.5, generator=generator)
    return nn.init.trunc_normal_(tensor, std=0.02, generator=generator)


def _is_last_norm(model: ModelSection, name: str) -> bool:
    traits = CONVOLUTIONAL.get(model.backbone)
    return traits is not None and bool(traits.last_norm) and part_of(name) != STEM and name.endswith(f"{traits.last_norm}.weight")
