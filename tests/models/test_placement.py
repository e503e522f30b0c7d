import numpy as np
import pytest
import torch

from lwfed.errors import ConfigError
from lwfed.models import pixels, placement


@pytest.fixture
def with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_without_an_accelerator_the_processor_computes(without_cuda, wanted):
    assert placement.choose(wanted) == torch.device("cpu")
    assert placement.accelerator() is None


@pytest.mark.parametrize(("wanted", "device"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_an_accelerator_is_taken_where_it_is_not_unwanted(with_cuda, wanted, device):
    assert placement.choose(wanted).type == device


def test_an_accelerator_that_is_not_there_is_an_error_that_says_what_to_do(without_cuda):
    with pytest.raises(ConfigError, match="set it to auto or cpu"):
        placement.choose("cuda")


def test_images_stay_as_they_are_for_the_processor_and_go_as_a_whole_elsewhere():
    images = np.zeros((4, 1, 8, 8), np.uint8)
    assert placement.move_images(images, torch.device("cpu")) is images
    moved = placement.move_images(images, torch.device("meta"))
    assert (moved.device.type, moved.shape, moved.dtype) == ("meta", (4, 1, 8, 8), torch.uint8)


def test_transforms_make_no_tensors_on_another_device():
    """On the meta device, which refuses to compute with tensors of the processor as others do."""
    images, amounts = torch.empty(4, 3, 16, 16, device="meta"), torch.empty(4, device="meta")
    transforms = [pixels.adjust_brightness, pixels.adjust_contrast, pixels.adjust_saturation, pixels.adjust_hue, pixels.gaussian_blur]
    boxes = torch.empty(4, 4, dtype=torch.int64, device="meta")
    flip = torch.empty(4, dtype=torch.bool, device="meta")
    found = [*(transform(images, amounts) for transform in transforms), pixels.crop_resize(images, boxes, 16, flip)]
    assert {one.device.type for one in found} == {"meta"}
