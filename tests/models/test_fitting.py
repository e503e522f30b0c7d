import gc
import subprocess
import sys
import weakref

import pytest
import torch

from lwfed.config import load_config
from lwfed.errors import Unfit
from lwfed.models import fitting, step
from lwfed.models.fitting import LEAST_PIECE, PASSING, PIECE_BYTES, SPARE, VIEW_COPIES, Need, measure, micro_batch
from lwfed.models.initial import init_parts
from lwfed.models.step import METHOD_ALONE, Terms

CPU = torch.device("cpu")


def need(config, stage, batch=8, terms=METHOD_ALONE, **how):
    plan = config.plan(stage)
    return measure(config, init_parts(config, plan.present), plan.trained, terms, batch, **how)


def test_a_layer_holds_what_its_operations_save(tiny):
    """One layer for one image: input of the second norm, mean and deviation of both, inputs of four products, qkv and what attention gives,
    input of GELU. What goes into the first norm are the prefix's tokens, which a step holds anyway.
    """
    config = tiny()
    tokens, width, hidden, heads = 4, 16, 64, 2
    floor = 4 * tokens * (width + 2 * 2 + width + 3 * width + width + width + hidden + hidden)
    found = need(config, 2).per_image
    assert floor <= found <= 1.5 * floor + 4 * heads * tokens * tokens * 2
    assert need(config, 2).passing / PASSING == 4 * tokens * hidden, "GELU's input is the largest tensor"
    assert need(config, 2).view_count == 2


def test_more_trained_layers_hold_more_and_a_larger_batch_only_more_of_a_whole_one(tiny):
    one, three = need(tiny(), 3), need(tiny("stages.strategy=progressive"), 3)
    assert 3 * one.per_image < three.per_image < 3.5 * one.per_image, "and what goes into the stem, and between layers"
    small, large = need(tiny(), 3, batch=8), need(tiny(), 3, batch=16)
    assert (large.per_image, large.fixed) == (small.per_image, small.fixed)
    assert large.whole - small.whole == small.whole > 8 * 2 * 4 * 16 * 4, "two views of tokens, at least"


def test_half_of_the_precision_is_half_of_the_tokens(tiny):
    assert need(tiny(), 3).whole - need(tiny(), 3, kept_as=torch.float16).whole == 8 * 2 * 4 * 16 * 2


def test_measuring_leaves_no_weights_behind(tiny, monkeypatch):
    made, copies = step.prepare, []

    def remember(*given, **how):
        branches = made(*given, **how)
        copies.extend(weakref.ref(tensor) for tensor in branches.trained)
        return branches

    monkeypatch.setattr(fitting, "prepare", remember)
    need(tiny(), 2)
    gc.collect()
    assert copies
    assert not any(one() is not None for one in copies)


def test_alignment_holds_further_branches(tiny):
    config = tiny("alignment.method=moon")
    assert need(config, 2, terms=Terms(config.alignment)).fixed > need(tiny(), 2).fixed


@pytest.mark.parametrize(
    ("wanted", "room", "expected"),
    [
        ("auto", 1e12, 15),  # 16 are fast: in seven pieces, all but one of 15
        ("auto", 1.1 * (1e6 + 5.5 * PIECE_BYTES / 16), 5),  # what fits
        ("null", 1e12, 100),
        ("7", 1e12, 7),
        ("700", 1e12, 100),
    ],
)
def test_the_micro_batch_is_as_prescribed_or_what_is_fast_and_fits(tiny, wanted, room, expected):
    config = tiny(f"train.micro_batch={wanted}")
    assert micro_batch(config, Need(1e6, PIECE_BYTES / 16, 100), CPU, room) == expected


def test_a_loss_that_compares_all_images_takes_matrices_of_them(tiny):
    def quadratic(method):
        few, many = (need(tiny(f"ssl.method={method}"), 2, batch=count).loss for count in (100, 200))
        return (many - 2 * few) / (4 * (200**2 - 2 * 100**2))

    assert [quadratic(method) for method in ("byol", "moco_v3", "simclr")] == [0, 6, 12]


def test_heads_and_loss_take_their_share_when_layers_have_gone():
    assert Need(1e6, per_image=1e5, loss=3e5, batch_size=8).of(4) == Need(1e6, 1e5, 8).of(4)
    assert Need(1e6, per_image=1e5, loss=5e5, batch_size=8).of(4) == pytest.approx(SPARE * (1e6 + 5e5))


def test_a_whole_batch_holds_the_layers_of_all_views_with_heads_and_loss():
    takes = Need(1e6, per_image=1e5, view_count=2, loss=3e5, batch_size=4)
    assert takes.of(4) == pytest.approx(SPARE * (1e6 + 2 * 4 * 1e5 + 3e5))
    assert takes.of(3) == pytest.approx(SPARE * (1e6 + 3e5)), "one view at a time, and not with the loss"


def test_a_backward_pass_takes_more_than_is_kept():
    assert Need(0, per_image=1e5, passing=2e5, batch_size=8).of(4) == pytest.approx(SPARE * 4 * 3e5)
    assert Need(0, per_image=1e5, passing=2e5, view_count=2, batch_size=4).of(4) == pytest.approx(SPARE * 4 * (2 * 1e5 + 2e5))


def test_views_take_their_share_while_they_are_made():
    """A block of them is made at a time, of which transforms hold copies; large images come in small blocks."""
    small, large = Need(0, 1e4, view_bytes=12e3, batch_size=512), Need(0, 1e4, view_bytes=6e5, batch_size=512)
    copies = SPARE * VIEW_COPIES
    assert small.of(8) == pytest.approx(copies * 64 * 12e3 + SPARE * 8 * 1e4)
    assert large.of(8) == pytest.approx(copies * 8 * 6e5 + SPARE * 8 * 1e4), "6 are 4 MB"
    assert small.of(512) == pytest.approx(copies * 512 * 12e3 + SPARE * 512 * 1e4)
    assert Need(0, 1e4, view_bytes=12e3, batch_size=5).of(5) == pytest.approx(copies * 5 * 12e3 + SPARE * 5 * 1e4)


def test_what_training_frees_makes_room_for_what_only_training_takes():
    takes = Need(fixed=1e6, per_image=1e5, batch_size=8, whole=2e6)
    assert takes.plus(5e5, freed=1e6).of(4) == pytest.approx(takes.of(4) + SPARE * 5e5 - 1e6)
    assert takes.plus(0, freed=1e9).of(4) == pytest.approx(SPARE * 1e6), "a trial before it takes the rest"


def test_views_drawn_ahead_are_counted(tiny):
    few, many = (need(tiny(), 2, drawn=count).whole for count in (0, 1000))
    boxes_and_order, amounts_and_sigma, flags = 8 * 8, 5 * 4, 4
    assert many - few == 2 * 1000 * 2 * (boxes_and_order + amounts_and_sigma + flags)


@pytest.mark.parametrize(("wanted", "least"), [("auto", 1), ("7", 7), ("null", 100)])
def test_what_does_not_fit_is_said_in_megabytes(tiny, wanted, least):
    config, takes = tiny(f"train.micro_batch={wanted}"), Need(1e6, 1e6, 100)
    room = takes.of(least) - 1e5
    with pytest.raises(Unfit, match=rf"takes {takes.of(least) / 1e6:.0f} MB more, and there is room for {room / 1e6:.0f} MB"):
        micro_batch(config, takes, CPU, room)
    assert micro_batch(config, takes, CPU, takes.of(least) + 1) >= least


@pytest.mark.parametrize(("batch_size", "expected"), [(16, 16), (24, 24), (25, 13), (33, 11), (48, 16)])
def test_a_batch_hardly_larger_than_what_is_fast_is_one_piece_and_others_are_as_few_as_can_be(tiny, batch_size, expected):
    assert micro_batch(tiny(), Need(1e6, PIECE_BYTES / 16, batch_size), CPU) == expected


def test_a_gpu_takes_larger_pieces(tiny):
    assert micro_batch(tiny(), Need(1e6, fitting.GPU_PIECE_BYTES / 16, 24), torch.device("cuda")) == 12


def test_a_whole_batch_for_which_there_is_no_room_is_cut_in_two(tiny):
    takes = Need(1e6, PIECE_BYTES / 16, view_count=2, batch_size=20)
    assert micro_batch(tiny(), takes, CPU, takes.of(20) - 1) == 10


def test_where_memory_is_ample_products_are_not_made_too_small_to_be_fast(tiny):
    takes = Need(1e6, PIECE_BYTES, 100)
    assert micro_batch(tiny(), takes, CPU) == LEAST_PIECE
    assert micro_batch(tiny(), takes, CPU, takes.of(2) + 1) == 2
    assert micro_batch(tiny(), Need(1e6, PIECE_BYTES, 3), CPU) == 3


def test_batch_statistics_need_the_whole_batch():
    assert micro_batch(load_config("resnet18"), Need(1e6, 1e9, 64), CPU) == 64


PROGRAM = """
import sys
import psutil
import torch
from lwfed.config import load_config
from lwfed.models import allocator, fitting
from lwfed.models.initial import init_parts
from lwfed.models.local import device_task, train_local
from lwfed.models.step import Means, Terms
from lwfed.plan import Place

torch.set_num_threads(1)
config = load_config(sys.argv[1], ["train.batch_size=8", "train.micro_batch=4", "train.epochs=1"])
plan = config.plan(2)
tensors = init_parts(config, plan.present)
found = fitting.code_bytes(config, tensors, plan.trained, Terms(config.alignment))
allocator.let_code_go()
before = psutil.Process().memory_info().shared
images = torch.randint(0, 256, (16, config.model.channels, config.model.image_size, config.model.image_size), dtype=torch.uint8)
train_local(config, device_task(config, plan, 0, Place(0, 1, 0, 1)), tensors, images.numpy(), means=Means(micro_batch=4))
print(found, psutil.Process().memory_info().shared - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what of files is in memory")
@pytest.mark.parametrize("preset", ["demo", "paper"])
def test_the_code_that_training_maps_is_foreseen(preset):
    out = subprocess.run([sys.executable, "-c", PROGRAM, preset], capture_output=True, text=True, check=True, timeout=100).stdout
    foreseen, mapped = map(float, out.split())
    assert 10e6 < mapped <= SPARE * foreseen < 1.5 * mapped
