import copy
import math

import pytest
import torch

from lwfed.models.initial import init_parts
from lwfed.models.ssl import LOSSES
from lwfed.models.step import prefix_layers, prepare, train_step

PARTS = {"stem", "layer.1", "layer.2", "norm", "projector", "predictor"}


def views():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, 8, 8, generator=generator), torch.rand(6, 3, 8, 8, generator=generator)


def prepared(config, stage):
    plan = config.plan(stage)
    tensors = init_parts(config, plan.present)
    return prepare(config, tensors, plan.trained), tensors, plan


@pytest.mark.parametrize(("strategy", "stage"), [("layer_wise", 1), ("layer_wise", 3), ("progressive", 2), ("end_to_end", 1)])
def test_two_steps_against_whole_modules(tiny, strategy, stage):
    """The same two steps with two whole networks, torch's AdamW and an EMA by hand: no prefix, nothing shared."""
    config = tiny(f"stages.strategy={strategy}", "train.weight_decay=0.0", "ssl.momentum=0.5")
    made, _, _ = prepared(config, stage)
    online = copy.deepcopy(made.online)
    target = copy.deepcopy(made.online).requires_grad_(False)
    trained = [tensor for tensor in online.parameters() if tensor.requires_grad]
    reference = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, foreach=True)
    for _ in range(2):
        queries = [online.predict(online.features(view)) for view in views()]
        keys = [target.project(target.features(view)) for view in views()]
        loss = LOSSES["moco_v3"](queries, keys, config.ssl)
        reference.zero_grad()
        loss.backward()
        reference.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), online.parameters(), strict=True):
                old.copy_(0.5 * old + 0.5 * new)
        assert train_step(made, views(), 1e-3, config) == pytest.approx(loss.item(), rel=1e-5)
    for (name, mine), theirs in zip(made.online.named_parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3, msg=name)


def test_frozen_parts_are_shared_and_stay_as_they_are(tiny):
    made, tensors, _ = prepared(tiny(), 2)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    train_step(made, views(), 1e-2, tiny())
    named = dict(made.online.named_parameters())
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        assert named[name].data_ptr() == tensors[name].data_ptr()
        assert named[name].grad is None
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)  # trained ones were copied
    assert not torch.equal(named["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])
    assert made.prefix_layers == 1


def test_prefix_runs_once_per_view(tiny):
    made, _, _ = prepared(tiny(), 3)
    calls = []
    made.online.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    train_step(made, views(), 1e-3, tiny())
    assert calls == [False, False]


def test_a_loss_that_is_not_finite_changes_nothing(tiny):
    made, tensors, _ = prepared(tiny(), 1)
    assert math.isnan(train_step(made, (torch.full((6, 3, 8, 8), float("nan")), views()[0]), 1e-3, tiny()))
    assert all(torch.equal(dict(made.online.named_parameters())[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("trained", "layers"),
    [
        (PARTS, None),
        (PARTS - {"stem"}, 0),
        (PARTS - {"stem", "layer.1"}, 1),
        ({"norm", "projector", "predictor"}, 2),
    ],
)
def test_prefix_layers(trained, layers):
    assert prefix_layers(PARTS, trained) == layers


@pytest.mark.parametrize("trained", [set(), {"layer.1"}, PARTS - {"norm"}, PARTS - {"layer.1"}, {*PARTS, "layer.3"}])
def test_only_the_end_of_the_model_can_be_trained(trained):
    with pytest.raises(ValueError, match="cannot be trained"):
        prefix_layers(PARTS, trained)
