import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lwfed.config import load_config
from lwfed.models.cost import count, stage_cost, true_macs
from lwfed.models.initial import init_parts
from lwfed.models.local import draw_batch
from lwfed.models.measure import measure
from lwfed.models.shapes import size_bytes
from lwfed.models.step import Terms, backward, prefix_layers, prepare

STRATEGIES = [("end_to_end", 1), ("layer_wise", 1), ("layer_wise", 3), ("progressive", 2)]
METHODS = ["moco_v3", "simclr", "byol", "mae"]


def counted(config, stage):
    """MACs an image of a real step's forward and backward pass. In float64, for which no product goes through oneDNN's
    own operation, and with an attention made of products, for the counter knows no others."""
    plan, size = config.plan(stage), config.model.image_size
    tensors = {name: tensor.double() for name, tensor in init_parts(config, plan.present).items()}
    previous = {name: tensor.double() for name, tensor in init_parts(config, plan.trained).items()}
    terms = Terms(config.alignment)
    made = prepare(config, tensors, plan.trained, terms, previous)
    count = config.train.batch_size
    images = torch.zeros(count, config.model.channels, size, size, dtype=torch.uint8)
    batch = draw_batch(config, 0, 0, images, prefix_layers(set(plan.present), set(plan.trained)) or 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backward(made, batch, config, terms)
    return counter.get_total_flops() / 2 / count


@pytest.mark.parametrize("micro_batch", ["null", 3, 8])
@pytest.mark.parametrize("alignment", ["off", "cosine", "moon"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("strategy", "stage"), STRATEGIES)
def test_true_cost_is_what_a_step_takes(tiny, strategy, stage, method, alignment, micro_batch):
    settings = ["ssl.decoder_width=32", f"stages.strategy={strategy}", f"ssl.method={method}"]
    config = tiny(*settings, f"alignment.method={alignment}", f"train.micro_batch={micro_batch}")
    assert true_macs(config, config.plan(stage), measure(config)) == pytest.approx(counted(config, stage), rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        (["model.pooling=token"], 2),
        (["stages.overlap=1"], 2),
        (["stages.overlap=1"], 3),
        (["stages.layers_per_stage=[1, 2]"], 2),
    ],
)
def test_other_true_costs(tiny, settings, stage):
    config = tiny(*settings, "alignment.method=cosine")
    assert true_macs(config, config.plan(stage), measure(config)) == pytest.approx(counted(config, stage), rel=1e-9)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_100"])
@pytest.mark.parametrize(("strategy", "stage"), [("layer_wise", 1), ("layer_wise", 2), ("layer_wise", 4), ("end_to_end", 1)])
def test_true_costs_of_convolutions(tiny, backbone, strategy, stage):
    pytest.importorskip("timm")
    config = tiny(f"model={{backbone: {backbone}, image_size: 16}}", f"stages.strategy={strategy}", "train.batch_size=4")
    assert true_macs(config, config.plan(stage), measure(config)) == pytest.approx(counted(config, stage), rel=1e-9)
