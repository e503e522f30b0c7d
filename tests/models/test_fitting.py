import pytest
import torch

from lwfed.config import load_config
from lwfed.errors import Unfit
from lwfed.models.fitting import LEAST_PIECE, PIECE_BYTES, Need, measure, micro_batch
from lwfed.models.initial import init_parts
from lwfed.models.prefix import TorchPrefix
from lwfed.models.step import AT_ONCE, METHOD_ALONE, Means, Terms

CPU = torch.device("cpu")


def need(config, stage, batch=8, means=AT_ONCE, terms=METHOD_ALONE):
    plan = config.plan(stage)
    return measure(config, init_parts(config, plan.present), plan.trained, terms, batch, means)


def test_a_layer_holds_what_its_operations_save(tiny):
    """One layer for one image: inputs of two norms with mean and deviation, of four products, qkv and what attention gives, of GELU."""
    config = tiny()
    tokens, width, hidden, heads = 4, 16, 64, 2
    floor = 4 * tokens * (2 * width + 2 * 2 + width + 3 * width + width + width + hidden + hidden)
    found = need(config, 2).per_image
    assert floor <= found <= 1.5 * floor + 4 * heads * tokens * tokens * 2


def test_more_trained_layers_hold_more_and_a_larger_batch_only_more_that_is_fixed(tiny):
    one, three = need(tiny(), 3), need(tiny("stages.strategy=progressive"), 3)
    assert three.per_image == pytest.approx(3 * one.per_image, rel=0.1)
    small, large = need(tiny(), 3, batch=8), need(tiny(), 3, batch=16)
    assert large.per_image == small.per_image
    heads_and_tokens = large.fixed - small.fixed
    assert heads_and_tokens > 8 * 2 * 4 * 16 * 4, "two views of tokens, at least"
    assert small.fixed - heads_and_tokens > 0, "weights, gradients and moments"


def test_half_of_the_precision_is_half_of_the_tokens(tiny):
    config, plan = tiny(), tiny().plan(3)
    tensors = init_parts(config, plan.present)

    class Half(TorchPrefix):
        kept_as = torch.float16

    from lwfed.models.backbones import load_encoder

    halved = measure(config, tensors, plan.trained, METHOD_ALONE, 8, Means(Half(load_encoder(config.model, tensors), 2)))
    whole = measure(config, tensors, plan.trained, METHOD_ALONE, 8)
    assert whole.fixed - halved.fixed == 8 * 2 * 4 * 16 * 2


def test_alignment_holds_further_branches(tiny):
    config = tiny("alignment.method=moon")
    assert need(config, 2, terms=Terms(config.alignment)).fixed > need(tiny(), 2).fixed


@pytest.mark.parametrize(
    ("wanted", "room", "expected"),
    [
        ("auto", 1e12, 16),  # what is fast
        ("auto", 1.1 * (1e6 + 5.5 * PIECE_BYTES / 16), 5),  # what fits
        ("null", 1e12, 100),
        ("7", 1e12, 7),
        ("700", 1e12, 100),
    ],
)
def test_the_micro_batch_is_as_prescribed_or_what_is_fast_and_fits(tiny, wanted, room, expected):
    config = tiny(f"train.micro_batch={wanted}")
    assert micro_batch(config, Need(1e6, PIECE_BYTES / 16), 100, CPU, room) == expected


@pytest.mark.parametrize(("wanted", "least"), [("auto", 1), ("7", 7), ("null", 100)])
def test_what_does_not_fit_is_said_in_megabytes(tiny, wanted, least):
    config, takes = tiny(f"train.micro_batch={wanted}"), Need(1e6, 1e6)
    room = takes.of(least) - 1e5
    with pytest.raises(Unfit, match=rf"takes {takes.of(least) / 1e6:.0f} MB more, and there is room for {room / 1e6:.0f} MB"):
        micro_batch(config, takes, 100, CPU, room)
    assert micro_batch(config, takes, 100, CPU, takes.of(least) + 1) >= least


def test_where_memory_is_ample_products_are_not_made_too_small_to_be_fast(tiny):
    assert micro_batch(tiny(), Need(1e6, PIECE_BYTES), 100, CPU) == LEAST_PIECE
    assert micro_batch(tiny(), Need(1e6, PIECE_BYTES), 100, CPU, Need(1e6, PIECE_BYTES).of(2) + 1) == 2
    assert micro_batch(tiny(), Need(1e6, PIECE_BYTES), 3, CPU) == 3


def test_batch_statistics_need_the_whole_batch():
    assert micro_batch(load_config("resnet18"), Need(1e6, 1e9), 64, CPU) == 64
