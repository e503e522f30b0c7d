import torch

from lwfed.models.initial import init_parts
from lwfed.models.step import prepare


def branches(tiny):
    config = tiny()
    return prepare(config, init_parts(config, config.plan(2).present), config.plan(2).trained)


def test_only_trained_parameters_are_copied(tiny):
    made = branches(tiny)
    target = dict(made.target.network.named_parameters())
    for name, mine in made.online.named_parameters():
        shared = name.startswith(("patch_embed", "pos_embed", "blocks.0", "predictor"))
        assert (target[name] is mine) == shared, name
        assert torch.equal(target[name], mine)
        assert shared or not target[name].requires_grad
    assert all(tensor.requires_grad for tensor in made.online.predictor.parameters())


def test_update_is_the_formula(tiny):
    made = branches(tiny)
    online, target = dict(made.online.named_parameters()), dict(made.target.network.named_parameters())
    before = {name: tensor.detach().clone() for name, tensor in target.items()}
    with torch.no_grad():
        for tensor in online.values():
            if tensor.requires_grad:
                tensor.add_(1)
    made.target.update(0.9)
    for name, tensor in target.items():
        if tensor is not online[name]:
            torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * online[name].detach())
