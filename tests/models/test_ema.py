import torch

from lwfed.models.initial import init_parts
from lwfed.models.step import Terms, prepare


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


def test_a_decoder_is_not_copied(tiny):
    config = tiny("ssl.method=mae", "ssl.decoder_width=32", "alignment.method=cosine")
    made = prepare(config, init_parts(config, config.plan(2).present), config.plan(2).trained, Terms(config.alignment))
    assert made.received.decoder is made.online.decoder
    assert all(tensor.requires_grad for tensor in made.online.decoder.parameters())


def test_updates_are_those_of_torch(tiny):
    """Against torch.optim.swa_utils, over steps of a training that moves the weights."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    made = branches(tiny)
    reference = AveragedModel(made.online, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(made.online)  # the first call copies
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        with torch.no_grad():
            for tensor in made.trained:
                tensor += torch.randn(tensor.shape, generator=generator)
        made.target.update(0.9)
        reference.update_parameters(made.online)
    for (name, mine), theirs in zip(made.target.network.named_parameters(), reference.module.parameters(), strict=True):
        if not name.startswith("predictor"):
            torch.testing.assert_close(mine, theirs, msg=name)


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
