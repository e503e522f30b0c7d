import pytest
import torch
import torch.nn.functional as F

from lwfed.models import kernels


@pytest.fixture(params=["onednn", "torch"])
def library(request, monkeypatch):
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(kernels, "library", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (3, 5, 8)])
def test_values_and_gradients_are_those_of_torch(library, shape, bias):
    torch.manual_seed(0)
    layer, x = kernels.Linear(8, 4, bias=bias), torch.randn(shape, requires_grad=True)
    weight, own = torch.randn(*shape[:-1], 4), x.detach().clone().requires_grad_()
    (layer(x) * weight).sum().backward()
    mine = [tensor.grad for tensor in (x, *layer.parameters())]
    layer.zero_grad()
    (F.linear(own, layer.weight, layer.bias) * weight).sum().backward()
    for got, wanted in zip(mine, [tensor.grad for tensor in (own, *layer.parameters())], strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_only_wanted_gradients_are_computed(library, frozen):
    layer, x = kernels.Linear(8, 4), torch.randn(3, 8, requires_grad=frozen != "input")
    layer.weight.requires_grad_(frozen != "weight")
    layer(x).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (layer.weight.grad is None) == (frozen == "weight")
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 3.0))


def test_other_dtypes_are_left_to_torch(library):
    layer = kernels.Linear(8, 4).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16
