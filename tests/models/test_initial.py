import pytest
import torch

from lwfed.config import load_config
from lwfed.models.initial import grow, init_part, init_parts
from lwfed.models.shapes import shapes


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_part_depends_on_seed_and_name_alone(tiny):
    layer_wise, end_to_end = tiny(), tiny("stages.strategy=end_to_end")
    staged = {}
    for stage in (1, 2, 3):
        staged |= grow(layer_wise, layer_wise.plan(stage), staged)
    assert same(staged, {name: init_parts(end_to_end, end_to_end.plan(1).present)[name] for name in staged})
    assert not torch.equal(staged["blocks.0.mlp.fc1.weight"], staged["blocks.1.mlp.fc1.weight"])
    assert not same(init_part(tiny("run.seed=1"), "layer.1"), init_part(tiny(), "layer.1"))


def test_initialisation_neither_reads_nor_moves_the_global_generator(tiny):
    torch.manual_seed(1)
    first, state = init_part(tiny(), "stem"), torch.get_rng_state()
    torch.manual_seed(2)
    assert same(init_part(tiny(), "stem"), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_distributions():
    config = load_config("base", ["model.pooling=token"])
    tensors = init_parts(config, config.plan(1).present)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes(config, config.plan(1).present)
    assert tensors["blocks.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert tensors["pos_embed"].std().item() == pytest.approx(0.02, rel=0.05)
    assert tensors["cls_token"].abs().max() < 1e-5
    assert tensors["patch_embed.proj.weight"].abs().max().item() == pytest.approx(48**-0.5, rel=0.01)
    assert tensors["projector.0.weight"].abs().max().item() == pytest.approx(192**-0.5, rel=0.01)
    assert torch.equal(tensors["blocks.0.attn.qkv.bias"], torch.zeros(576))
    assert torch.equal(tensors["blocks.0.norm1.weight"], torch.ones(192))


def test_copy_takes_the_layer_below(tiny):
    config = tiny("stages.layer_init=copy")
    first = grow(config, config.plan(1), {})
    assert same(first, init_parts(config, config.plan(1).present))
    first["blocks.0.mlp.fc1.bias"] += 1
    second = grow(config, config.plan(2), first)
    assert set(second) == set(shapes(config, ["layer.2"]))
    assert torch.equal(second["blocks.1.mlp.fc1.bias"], torch.ones(64))
    second["blocks.1.mlp.fc1.bias"] += 1
    assert torch.equal(first["blocks.0.mlp.fc1.bias"], torch.ones(64))


def test_copy_of_several_layers_a_stage(tiny):
    config = tiny("stages.layer_init=copy", "stages.layers_per_stage=2", "model.depth=4")
    first = grow(config, config.plan(1), {})
    second = grow(config, config.plan(2), first)
    for index in (2, 3):
        assert torch.equal(second[f"blocks.{index}.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])
