import math
from dataclasses import fields

import pytest
import torch

from lwfed.config import load_config
from lwfed.models import views


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[3, 1])
def source(request):
    return torch.randint(0, 256, (40, request.param, 16, 16), generator=generator(), dtype=torch.uint8)


SECTION = load_config("base").views


def pair(count, size, random):
    return views.draw(SECTION, 0, count, size, random), views.draw(SECTION, 1, count, size, random)


def test_the_same_generator_gives_the_same_views(source):
    drawn = [pair(40, 16, generator(3)) for _ in range(2)]
    made = [[views.augment(source, params, 16) for params in params_of_views] for params_of_views in drawn]
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    assert not torch.equal(made[0][0], made[0][1])


def test_a_view_is_an_image_and_leaves_its_source_alone(source):
    before = source.clone()
    view = views.augment(source, views.draw(SECTION, 1, 40, 16, generator()), 16)
    assert (view.shape, view.dtype) == (source.shape, torch.float32)
    assert 0 <= view.min() <= view.max() <= 1
    assert torch.equal(source, before)


def test_samples_do_not_see_each_other(source):
    params = views.draw(SECTION, 1, 40, 16, generator())
    whole = views.augment(source, params, 16)
    alone = [views.ViewParams(**{field.name: getattr(params, field.name)[i : i + 1] for field in fields(params)}) for i in range(40)]
    parts = [views.augment(source[i : i + 1], alone[i], 16) for i in range(40)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


def test_composition_is_that_of_torchvision(source):
    """Sample by sample, in the stated order: crop, flip, jitter in its drawn order, grey, blur, solarise."""
    from torchvision.transforms.v2 import functional as vision

    params = views.draw(SECTION, 1, 40, 16, generator(1))
    adjust = [vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation, vision.adjust_hue]
    params.sigma[::2] = 1.0
    params.solarise[:] = False  # a threshold turns rounding into a difference of 1; it has a test of its own
    expected = []
    for i, image in enumerate(source / 255):
        image = vision.resized_crop(image, *params.boxes[i].tolist(), [16, 16], antialias=True)
        image = vision.horizontal_flip(image) if params.flip[i] else image
        for which in params.order[i].tolist() if params.jitter[i] else []:
            image = adjust[which](image, params.amounts[i, which].item())
        image = vision.rgb_to_grayscale(image, len(image)) if params.grayscale[i] else image
        image = vision.gaussian_blur(image, [3, 3], [params.sigma[i].item()] * 2) if params.sigma[i] > 0 else image
        expected.append(image)
    torch.testing.assert_close(views.augment(source, params, 16), torch.stack(expected), atol=1e-5, rtol=0)


def test_nothing_to_do_is_the_identity(source):
    still = {"flip": 0, "jitter": 0, "grayscale": 0, "blur": (0, 0), "solarise": (0, 0), "crop_scale": (1, 1)}
    params = views.draw(SECTION.model_copy(update=still), 0, 40, 16, generator())
    params.boxes[:] = torch.tensor([0, 0, 16, 16])
    torch.testing.assert_close(views.augment(source, params, 16), source / 255, atol=1e-6, rtol=0)


def test_other_size_than_the_source(source):
    assert views.augment(source, views.draw(SECTION, 0, 40, 16, generator()), 24).shape[2:] == (24, 24)


def test_probabilities_and_ranges():
    first, second = pair(20_000, 32, generator())
    for params, blur, solarise in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        shares = [params.flip, params.jitter, params.grayscale, params.sigma > 0, params.solarise]
        measured = [share.double().mean().item() for share in shares]
        assert measured == pytest.approx([0.5, 0.8, 0.2, blur, solarise], abs=0.015)
        sigma = params.sigma[params.sigma > 0]
        assert 0.1 <= sigma.min() < 0.15 < 1.95 < sigma.max() <= 2.0
        spread = (params.amounts - torch.tensor([1.0, 1, 1, 0])).abs().amax(0)
        torch.testing.assert_close(spread, torch.tensor([0.4, 0.4, 0.2, 0.1]), atol=1e-3, rtol=0)
        assert (params.order.sort(1).values == torch.arange(4)).all()
        assert (params.order[:, 0].bincount() / 20_000 - 0.25).abs().max() < 0.015


def test_boxes_are_those_of_torchvision():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.zeros(1, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]).double()
    ours = views.draw_boxes((0.2, 1.0), 40_000, 32, generator()).double()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.4, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.4, rtol=0)
    top, left, height, width = ours.unbind(1)
    assert (top + height).max() == (left + width).max() == 32
    assert top.min() == left.min() == 0
    assert math.floor(32 * math.sqrt(0.2 * 0.75)) <= height.min() < height.max() == 32


def test_a_box_that_never_fits_is_the_whole_image():
    boxes = views.draw_boxes((4.0, 4.0), 3, 8, generator())
    assert boxes.tolist() == [[0, 0, 8, 8]] * 3
