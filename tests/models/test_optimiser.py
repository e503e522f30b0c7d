import pytest
import torch

from lwfed.models.optimiser import AdamW

SHAPES = {"blocks.0.mlp.fc1.weight": (7, 5), "blocks.0.mlp.fc1.bias": (7,), "pos_embed": (1, 4, 5), "cls_token": (1, 1, 5)}


@pytest.mark.parametrize("weight_decay", [0.0, 1e-5, 0.1])
def test_bits_of_torch(weight_decay):
    generator = torch.Generator().manual_seed(0)
    ours = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in SHAPES.items()}
    theirs = {name: tensor.detach().clone().requires_grad_() for name, tensor in ours.items()}
    plain = [tensor for name, tensor in theirs.items() if not name.endswith("fc1.weight")]
    groups = [{"params": [theirs["blocks.0.mlp.fc1.weight"]], "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, foreach=True)
    optimiser = AdamW(ours, weight_decay)
    for step in range(200):
        lr = 1e-2 / (1 + step)
        for name in ours:
            gradient = torch.randn(SHAPES[name], generator=generator) * 10 ** (step % 7 - 4)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        optimiser.step(lr)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), step
    assert all(tensor.grad is None for tensor in ours.values())


def test_missing_gradient_is_an_error():
    with pytest.raises(ValueError, match="1 tensors to be optimised have no gradient"):
        AdamW({"projector.0.weight": torch.zeros(2, 2)}, 0.0).step(1e-3)
