import torch
import torch.nn.functional as F

from lwfed.config import load_config
from lwfed.models.heads import load_network, predict, project
from lwfed.models.initial import init_parts


def test_parameter_counts_of_vit_tiny():
    config = load_config("base")
    network = load_network(config, init_parts(config, config.plan(1).present))
    count = lambda module: sum(tensor.numel() for tensor in module.parameters())  # noqa: E731
    assert count(network.blocks[0]) == 444_864
    assert count(network.projector) == 493_568
    assert count(network.predictor) == 263_168
    assert not list(network.buffers())


def test_heads_are_linear_batchnorm_relu(tiny):
    config = tiny()
    t = init_parts(config, config.plan(1).present)
    network = load_network(config, t)
    features = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))

    def norm(x, weight=None, bias=None):
        x = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
        return x if weight is None else x * weight + bias

    h = F.relu(norm(features @ t["projector.0.weight"].T, t["projector.1.weight"], t["projector.1.bias"]))
    h = F.relu(norm(h @ t["projector.3.weight"].T, t["projector.4.weight"], t["projector.4.bias"]))
    h = norm(h @ t["projector.6.weight"].T)
    p = F.relu(norm(h @ t["predictor.0.weight"].T, t["predictor.1.weight"], t["predictor.1.bias"]))
    p = norm(p @ t["predictor.3.weight"].T)
    torch.testing.assert_close(project(network, features), h, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predict(network, project(network, features)), p, atol=1e-4, rtol=1e-4)
