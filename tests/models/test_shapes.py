import math

import pytest
import torch

from lwfed.config import load_config
from lwfed.models.backbones import load_encoder
from lwfed.models.heads import build_network
from lwfed.models.initial import init_parts
from lwfed.models.shapes import part_shapes, shapes
from lwfed.plan import by_part


@pytest.mark.parametrize("pooling", ["mean", "token"])
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_those_of_the_modules(tiny, pooling, channels):
    config = tiny(f"model.pooling={pooling}", f"model.channels={channels}", "model.mlp_ratio=2.6")
    present = config.plan(3).present
    with torch.device("meta"):
        state = build_network(config, 3).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes(config, present)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert {part: dict.fromkeys(names) for part, names in by_part(shapes(config, present)).items()} == {
        part: dict.fromkeys(part_shapes(config, part)) for part in present
    }


def test_parameter_counts_of_the_paper():
    """ViT-Tiny: one block 444,864, H 493,568, P 263,168; the published communication follows from them."""
    config = load_config("base")
    counts = {part: sum(map(math.prod, part_shapes(config, part).values())) for part in config.plan(12).present}
    assert counts["layer.1"] == counts["layer.12"] == 444_864
    assert (counts["projector"], counts["predictor"]) == (493_568, 263_168)


@pytest.mark.parametrize("part", ["layer.0", "layer.4", "layer.x", "head", "blocks.0"])
def test_unknown_part(tiny, part):
    with pytest.raises(ValueError, match="no part"):
        part_shapes(tiny(), part)


def test_missing_tensor_is_named(tiny):
    config = tiny()
    tensors = init_parts(config, config.plan(1).present)
    del tensors["blocks.0.attn.qkv.weight"]
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.weight"):
        load_encoder(config.model, tensors)
