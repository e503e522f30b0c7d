"""The same step on a CUDA device. Without one there is nothing to test."""

import pytest
import torch

from lwfed.models.initial import init_parts
from lwfed.models.local import device_task, train_local
from lwfed.models.placement import AcceleratorMeter, choose, move, move_images
from lwfed.models.step import Means

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


@pytest.fixture
def train(tiny, images):
    def train(device, *settings, stage=2, micro_batch=None):
        config = tiny("train.epochs=2", *settings)
        plan = config.plan(stage)
        task = device_task(config, plan, 5, config.place(stage, 1))
        tensors = move(init_parts(config, plan.present), torch.device(device))
        means = Means(micro_batch=micro_batch)
        trained, summary = train_local(config, task, tensors, move_images(images, torch.device(device)), means=means)
        return {name: tensor.cpu() for name, tensor in trained.items()}, summary

    return train


@pytest.mark.parametrize("method", ["moco_v3", "simclr", "byol", "mae"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_local_call_is_that_of_the_processor_up_to_rounding(train, method, micro_batch):
    settings = (f"ssl.method={method}", "ssl.decoder_width=32")
    (here, on_processor), (there, on_device) = (train(device, *settings, micro_batch=micro_batch) for device in ("cpu", "cuda"))
    assert on_device.losses == pytest.approx(on_processor.losses, rel=1e-3)
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-2, atol=1e-3)


def test_mixed_precision_is_near(train):
    whole, mixed = (train("cuda", f"train.precision={precision}")[1].losses for precision in ("fp32", "bf16"))
    assert mixed == pytest.approx(whole, rel=0.05)


def test_pieces_need_less_of_its_memory(tiny):
    config = tiny("model.width=64", "model.image_size=64", "train.batch_size=256", "stages.strategy=end_to_end")
    plan, device = config.plan(1), choose("cuda")
    images = torch.zeros(256, 3, 64, 64, dtype=torch.uint8, device=device)
    peaks = []
    for micro_batch in (None, 8):
        torch.cuda.empty_cache()
        meter = AcceleratorMeter(device)
        task = device_task(config, plan, 5, config.place(1, 1))
        train_local(config, task, move(init_parts(config, plan.present), device), images, means=Means(micro_batch=micro_batch))
        reading = meter.reading()
        assert 0 < reading["free_mb"] < torch.cuda.mem_get_info()[1] / 1e6
        peaks.append(reading["peak_mb"])
    assert peaks[1] < peaks[0] / 2
