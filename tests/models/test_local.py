import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lwfed.errors import ConfigError, DataError, Diverged
from lwfed.models.initial import init_parts
from lwfed.models.local import _batches, calibration_task, device_task, train_local
from lwfed.plan import Place
from lwfed.wire.messages import Beat

WHOLE, HALF = Place(0, 1, 0, 1), Place(0, 2, 0, 2)


def call(config, images, stage=2, seed=5, on_step=None, **changes):
    plan = config.plan(stage)
    tensors = init_parts(config, plan.present)
    task = replace(device_task(config, plan, seed, HALF), **changes)
    return (*train_local(config, task, tensors, images, on_step), tensors)


def digest(tensors):
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("strategy", ["layer_wise", "progressive"])
def test_equal_inputs_give_equal_bits(tiny, images, strategy):
    config = tiny(f"stages.strategy={strategy}")
    (first, summary, _), (again, repeated, _) = call(config, images), call(config, images)
    assert digest(first) == digest(again)
    assert summary == repeated
    assert digest(call(config, images, seed=6)[0]) != digest(first)


def test_more_steps_than_a_device_can_report_are_refused_before_the_first(tiny, images):
    def step(report):
        raise AssertionError("it has begun")

    with pytest.raises(ConfigError, match=r"1000001 steps.*lower train.epochs"):
        call(tiny(), images[:2], batch_size=2, epochs=1_000_001, on_step=step)


def test_every_epoch_has_every_image_once_in_an_order_of_its_own(tiny):
    task = device_task(tiny("train.epochs=3"), tiny().plan(2), 5, HALF)
    orders = [[], [], []]
    for epoch, indices in _batches(replace(task, epochs=3), 20, 8):
        assert len(indices) == 8
        orders[epoch] += indices.tolist()
    assert all(len(set(order)) == len(order) == 16 for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_calibration_of_a_stage_goes_through_a_schedule_of_its_own(tiny):
    """At the stage's place the cosine would have left next to nothing of the rate."""
    for every, place in (("stage", Place(0, 1, 0, 1, 0.5)), ("round", Place(9, 10, 4, 5, 0.5)), ("5", Place(9, 10, 4, 5, 0.5))):
        config = tiny(f"calibration.every={every}", "calibration.data=digits")
        assert calibration_task(config, config.plan(2), 0, Place(9, 10, 4, 5, 0.5)).place == place


def test_global_generator_is_neither_read_nor_moved(tiny, images):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = call(tiny(), images)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert digest(call(tiny(), images)[0]) == digest(first)


def test_array_memmap_and_tensor_are_the_same_images(tiny, images, tmp_path):
    stored = np.memmap(tmp_path / "images", dtype=np.uint8, mode="w+", shape=images.shape)
    stored[:] = images
    stored.flush()
    readonly = np.memmap(tmp_path / "images", dtype=np.uint8, mode="r", shape=images.shape)
    expected = digest(call(tiny(), images)[0])
    assert digest(call(tiny(), readonly)[0]) == expected
    assert digest(call(tiny(), torch.from_numpy(images))[0]) == expected


def test_exactly_the_trained_parts_come_back_changed(tiny, images):
    config = tiny()
    trained, _, tensors = call(config, images)
    untouched = init_parts(config, config.plan(2).present)
    assert digest(tensors) == digest(untouched)
    assert trained.keys() == init_parts(config, config.plan(2).trained).keys()
    assert all(not tensor.requires_grad for tensor in trained.values())
    # A zero bias before BatchNorm or softmax may keep a vanishing gradient; AdamW moves it nevertheless.
    assert all(not torch.equal(trained[name], tensors[name]) for name in trained)


def test_calibration_trains_the_whole_model(tiny, images):
    settings = ["calibration={every: round, data: digits, epochs: 2, batch_size: 10, lr: 0.5}"]
    config = tiny(*settings)
    task = calibration_task(config, config.plan(2), 0, WHOLE)
    assert (task.epochs, task.batch_size, task.lr) == (2, 10, 0.5)
    trained, _ = train_local(config, replace(task, lr=1e-3), init_parts(config, config.plan(2).present), images)
    assert trained.keys() == init_parts(config, config.plan(2).present).keys()


def test_steps_epochs_and_schedule(tiny, images):
    reports = []
    _, summary, _ = call(tiny(), images, on_step=reports.append, lr=0.64, place=WHOLE)
    assert [(report.epoch, report.step) for report in reports] == [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)]
    assert {(report.epochs, report.steps) for report in reports} == {(3, 6)}
    expected = [0.64 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * done / 6)) for done in range(6)]
    assert [report.lr for report in reports] == pytest.approx(expected)
    assert (summary.images, summary.steps) == (20, 6)
    losses = [report.loss for report in reports]
    assert summary.losses == pytest.approx([sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)])


@pytest.mark.parametrize(("count", "batch_size", "steps", "lr"), [(5, 8, 3, 5e-3), (8, 8, 3, 8e-3), (15, 8, 3, 8e-3), (2, 8, 3, 2e-3)])
def test_incomplete_batch_is_dropped_unless_it_is_the_only_one(tiny, images, count, batch_size, steps, lr):
    reports = []
    _, summary, _ = call(tiny(), images[:count], on_step=reports.append, batch_size=batch_size, lr=0.256, place=Place(0, 10**9, 0, 10**9))
    assert summary.steps == steps
    assert reports[0].lr == pytest.approx(lr)  # the rate follows the batch that is really used


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(tiny, images, count):
    with pytest.raises(DataError, match="at least 2"):
        call(tiny(), images[:count])


def test_images_that_do_not_fit(tiny, images):
    for wrong in (images[:, :1], images[..., :4], images.astype(np.float32), images[0]):
        with pytest.raises(DataError, match="uint8"):
            call(tiny(), wrong)


def test_divergence_names_epoch_step_and_remedy(tiny, images):
    with pytest.raises(Diverged, match=r"epoch \d of 3, step \d of 6.*lower train\.lr"):
        call(tiny(), images, lr=1e38)
    config = tiny()
    tensors = init_parts(config, config.plan(2).present)
    tensors["pos_embed"][0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match="the loss is nan in epoch 1 of 3, step 1 of 6"):
        train_local(config, device_task(config, config.plan(2), 0, WHOLE), tensors, images)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_loss_that_no_message_can_tell_is_divergence(tiny, images, monkeypatch, sign):
    """One below the bound is told, as every mean of such losses is."""

    def beat(loss):
        return Beat(run="demo", stage=2, round=1, epoch=1, epochs=1, step=1, steps=1, loss=loss, rss_mb=1.0)

    monkeypatch.setattr("lwfed.models.local.train_step", lambda *_: sign * 999_999.9)
    _, summary, _ = call(tiny(), images)
    assert [beat(loss).loss for loss in summary.losses] == pytest.approx([sign * 999_999.9] * 3)
    monkeypatch.setattr("lwfed.models.local.train_step", lambda *_: sign * 2e6)
    with pytest.raises(Diverged, match=r"the loss is -?2000000\.0 in epoch 1 of 3, step 1 of 6"):
        call(tiny(), images)


def test_divergence_in_the_last_step_is_seen_in_the_weights(tiny, images):
    with pytest.raises(Diverged, match="not finite after the last step"):
        call(tiny(), images, epochs=1, batch_size=20, lr=float("inf"))


def test_training_lowers_the_loss(tiny, images):
    _, summary, _ = call(tiny("ssl.temperature=0.2"), images, stage=1, epochs=30, lr=0.3)
    assert summary.losses[-1] < summary.losses[0] - 0.3


IMPORTS = """
import sys, torch, numpy as np
from lwfed.config import load_config
from lwfed.models.initial import init_parts
from lwfed.models.local import device_task, train_local
config = load_config("demo")
images = np.zeros((4, 3, 16, 16), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
plan = config.plan(2)
train_local(config, device_task(config, plan, 0, config.place(1, 1)), init_parts(config, plan.present), images)
print([name for name in ("torchvision", "timm", "torch._dynamo", "sklearn") if name in sys.modules])
"""


def test_training_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
