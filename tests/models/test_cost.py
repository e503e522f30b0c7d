"""Counts against real steps, closed forms and the model's own tensors."""

import math
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lwfed.config import load_config
from lwfed.models import fitting, step
from lwfed.models.cost import count, kept_by_layers, memory_bytes, paper_bytes, paper_macs, stage_cost, true_macs
from lwfed.models.initial import init_parts
from lwfed.models.measure import CONVOLUTION, measure
from lwfed.models.shapes import shapes
from lwfed.models.step import METHOD_ALONE, Means, Terms, backward, draw_batch, prepare
from lwfed.plan import PREDICTOR

from .conftest import TINY

STRATEGIES = [("end_to_end", 1), ("layer_wise", 1), ("layer_wise", 3), ("progressive", 2)]
METHODS = ["moco_v3", "simclr", "byol", "mae"]
EXACT = 1e-9


def counted(config, stage, skip=frozenset(), formulas=None):
    """MACs an image of a real step's forward and backward pass, by torch's formulas and those given in their place.

    In float64, for which no product goes through oneDNN's own operation, and with an attention made of products: the counter
    knows no others.
    """
    plan, size = config.plan(stage), config.model.image_size
    tensors, previous = (
        {name: tensor.double() for name, tensor in init_parts(config, parts).items()} for parts in (plan.present, plan.trained)
    )
    terms = Terms(config.alignment)
    micro_batch = config.train.micro_batch
    means = Means(micro_batch=micro_batch if isinstance(micro_batch, int) else None)
    made = prepare(config, tensors, plan.trained, terms, previous, means)
    images = torch.zeros(config.train.batch_size, config.model.channels, size, size, dtype=torch.uint8)
    batch = replace(draw_batch(config, 0, 0, images, made.prefix_layers), skip=frozenset(skip))
    one_by_one = patch.object(step, "VIEWS_AT_ONCE", 1)  # a batch of one block of views would keep that from pass to pass
    with one_by_one, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        backward(made, batch, config, terms)
    return counter.get_total_flops() / 2 / len(images)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("strategy", "stage"), STRATEGIES)
def test_layers_keep_as_much_as_a_device_measures(strategy, stage, method):
    """Both choose the micro-batch by it. A decoder's tokens that are not of the encoder are a device's alone."""
    config = load_config("demo", [f"stages.strategy={strategy}", f"ssl.method={method}"])
    plan = config.plan(stage)
    found = fitting.measure(config, init_parts(config, plan.present), plan.trained, METHOD_ALONE, 8).per_image
    assert found == pytest.approx(kept_by_layers(plan, measure(config)), rel=0.03 if method == "mae" else EXACT)


@pytest.fixture(scope="module")
def once():
    """What is measured of a tiny model; no setting but of model, method and batch changes it."""
    return cache(lambda method: measure(load_config("base", [*TINY, f"ssl.method={method}", "ssl.decoder_width=32"])))


@pytest.fixture(scope="module")
def paper():
    config = load_config("paper")
    return config, measure(config)


@pytest.mark.parametrize(
    ("strategy", "stage", "method", "alignment", "micro_batch"),
    [
        (*STRATEGIES[row], METHODS[column], *[("off", "null"), ("cosine", 8), ("moon", 3)][(row + column) % 3])
        for row in range(len(STRATEGIES))
        for column in range(len(METHODS))
    ],
)
def test_true_cost_is_what_a_step_takes(tiny, once, strategy, stage, method, alignment, micro_batch):
    """Every strategy with every method, and each alignment with every one of both."""
    settings = [f"stages.strategy={strategy}", f"alignment.method={alignment}", f"train.micro_batch={micro_batch}"]
    config = tiny(f"ssl.method={method}", "ssl.decoder_width=32", *settings)
    assert true_macs(config, config.plan(stage), once(method)) == pytest.approx(counted(config, stage), rel=EXACT)


@pytest.mark.parametrize(("setting", "stage"), [("model.pooling=token", 2), ("stages.overlap=1", 2), ("stages.layers_per_stage=[1, 2]", 2)])
def test_true_cost_of_other_plans(tiny, setting, stage):
    config = tiny(setting, "alignment.method=cosine")
    assert true_macs(config, config.plan(stage), measure(config)) == pytest.approx(counted(config, stage), rel=EXACT)


@pytest.mark.parametrize(("backbone", "stages"), [("resnet18", (1, 3)), ("mobilenetv3_small_100", (3,))])
def test_true_cost_of_convolutions(tiny, backbone, stages):
    pytest.importorskip("timm")
    config = tiny(f"model={{backbone: {backbone}, image_size: 16}}", "train.batch_size=4")
    measured = measure(config)
    for stage in stages:
        found = counted(config, stage, formulas=CONVOLUTION if backbone.startswith("mobilenet") else None)
        assert true_macs(config, config.plan(stage), measured) == pytest.approx(found, rel=EXACT)
        assert count(measured, config.plan(stage).present) == sum(map(math.prod, shapes(config, config.plan(stage).present).values()))


@pytest.mark.parametrize(("groups", "taken"), [(1, 2 * 8 * 6 * 9 * 25), (2, 8 * 6 * 9 * 25)])
def test_gradients_of_a_convolution_cost_what_its_groups_take(groups, taken):
    layer = torch.nn.Conv2d(6, 8, 3, padding=1, groups=groups, bias=False)
    out = layer(torch.randn(2, 6, 5, 5, requires_grad=True)).sum()
    with FlopCounterMode(display=False, custom_mapping=CONVOLUTION) as counter:
        out.backward()
    assert counter.get_total_flops() / 2 / 2 == taken  # two operations to a MAC, two samples


def test_depth_dropout_saves_its_share_of_the_frozen_layers(tiny, once):
    config, dropping = tiny(), tiny("stages.depth_dropout=0.25")
    whole, plan = counted(config, 3), config.plan(3)
    saved = sum(whole - counted(config, 3, {layer}) for layer in (0, 1))
    assert true_macs(dropping, plan, once("moco_v3")) == pytest.approx(whole - 0.25 * saved, rel=EXACT)
    assert paper_macs(dropping, plan, once("moco_v3")) < paper_macs(config, plan, once("moco_v3"))


@pytest.mark.parametrize(("size", "patch", "width", "heads"), [(32, 4, 192, 3), (64, 8, 96, 6), (28, 4, 64, 1)])
def test_a_layer_against_the_formula(size, patch, width, heads):
    """Four products of width x width for attention and eight for the MLP, and each token with each other one, twice."""
    model = f"model={{image_size: {size}, patch_size: {patch}, width: {width}, heads: {heads}, depth: 1}}"
    part = measure(load_config("base", [model, "train.batch_size=4"])).parts["layer.1"]
    tokens = (size // patch) ** 2
    assert part.forward == tokens * 12 * width**2 + 2 * tokens**2 * width
    assert part.backward == 2 * part.forward
    assert part.weights_only == part.backward  # its first norm is trained too
    assert part.normalised == 2 * tokens * width
    assert part.numbers == 12 * width**2 + 13 * width


@pytest.mark.parametrize("method", ["moco_v3", "simclr", "byol", "mae"])
@pytest.mark.parametrize(("alignment", "limit"), [("cosine", 1.15), ("moon", 1.25)])
def test_alignment_is_cheap_on_a_shared_prefix(method, alignment, limit):
    plain, aligned = (load_config("paper", [f"ssl.method={method}", f"alignment.method={one}"]) for one in ("off", alignment))
    measured = measure(plain)
    costs = [sum(stage_cost(one, stage, measured).gflops_true for stage in range(1, 13)) for one in (plain, aligned)]
    assert 1 < costs[1] / costs[0] < limit


def test_views_that_are_used_again_cost_their_prefix_once(paper):
    """In the run, through the new layer alone; in the round, where calibration moves the prefix; 15 rounds of 3 epochs."""
    measured = paper[1]
    once, calibrated = ["train.views_per_round=1"], ["calibration.every=round", "calibration.data=digits"]
    view = 2 * measured.view_macs
    stem, layers = measured.parts["stem"].forward, [measured.parts[f"layer.{number}"].forward for number in range(1, 13)]

    for settings, stage, share, kept in [
        ((), 1, 1, 0),
        ((), 2, 1 / 45, view + 2 * (stem + layers[0])),
        ((), 12, 1 / 45, 2 * layers[10]),
        (calibrated, 12, 1 / 3, view + 2 * (stem + sum(layers[:11]))),
    ]:
        fresh, reused = (
            true_macs(one, one.plan(stage), measured) for one in (load_config("paper", settings), load_config("paper", [*settings, *once]))
        )
        whole = 0 if stage == 1 else view + 2 * (stem + sum(layers[: stage - 1]))
        assert fresh - reused == pytest.approx(whole - share * kept)


@pytest.mark.parametrize(("every", "rounds"), [("never", 0), (5, 3), (4, 3), (15, 1)])
def test_the_paper_s_bytes_count_the_rounds_that_calibrate(paper, every, rounds):
    settings = [] if every == "never" else [f"calibration.every={every}", "calibration.data=digits"]
    config, measured = load_config("paper", settings), paper[1]
    extra = paper_bytes(config, measured) - paper_bytes(load_config("paper"), measured)
    assert extra == 4 * rounds * sum(count(measured, config.plan(stage).frozen) for stage in range(1, 13))


def test_memory_counts_what_heads_keep_and_what_the_prefix_gives(paper):
    config, measured = paper
    plan = config.plan(12)

    def without(**parts):
        changed = {name: replace(measured.parts[name], **values) for name, values in parts.items()}
        return memory_bytes(config, plan, replace(measured, parts={**measured.parts, **changed}))

    whole = memory_bytes(config, plan, measured)
    heads = {name: {"kept_bytes": 0.0, "entering_bytes": 0.0} for name in ("projector", "predictor")}
    kept = sum(measured.parts[name].kept_bytes + measured.parts[name].entering_bytes for name in heads)
    assert whole - without(**heads) == pytest.approx(2 * 512 * kept)
    given = measured.parts["layer.11"].given_bytes
    assert whole - without(**{"layer.11": {"given_bytes": 0.0}}) == pytest.approx(2 * 512 * given)


def test_where_much_is_trained_by_few_images_a_step_of_the_optimiser_takes_most():
    """A copy of the second moments, beside weights, their copy, gradients, two moments and the target branch."""
    config = load_config("resnet18", ["model.image_size=32", "train.batch_size=2"])
    plan, found = config.plan(4), measure(config)
    branches = count(found, set(plan.trained) - {PREDICTOR})
    held = 4 * (count(found, plan.present) + 5 * count(found, plan.trained) + branches)
    assert memory_bytes(config, plan, found) == pytest.approx(held + fitting.CODE_BYTES)


def test_a_micro_batch_costs_computation_and_saves_memory(paper):
    measured = paper[1]
    config, pieces = (load_config("paper", [f"train.micro_batch={size}"]) for size in ("null", 64))
    plan = config.plan(12)
    assert 1 < true_macs(pieces, plan, measured) / true_macs(config, plan, measured) < 1.15
    assert memory_bytes(pieces, plan, measured) < memory_bytes(config, plan, measured) / 3


def test_memory_grows_with_the_layers_that_are_trained_and_hardly_with_those_that_are_frozen(paper):
    measured = paper[1]
    config, whole = (load_config("paper", ["train.micro_batch=null", f"stages.strategy={one}"]) for one in ("layer_wise", "progressive"))
    frozen, trained = ([stage_cost(one, stage, measured).memory_mb for stage in (2, 12)] for one in (config, whole))
    assert frozen[1] / frozen[0] < 1.05
    assert trained[1] / trained[0] > 4
