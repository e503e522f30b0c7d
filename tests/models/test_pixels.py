import pytest
import torch

from lwfed.models import pixels


@pytest.fixture(scope="module")
def vision():
    from torchvision.transforms.v2 import functional

    return functional


@pytest.fixture(params=[3, 1])
def batch(request):
    """Noise, and the cases that hue dislikes: grey, black, white and pure colours."""
    images = torch.rand(9, request.param, 16, 16, generator=torch.Generator().manual_seed(0))
    images[5] = images[5, :1]
    images[6], images[7] = 0, 1
    images[8] = torch.eye(request.param).repeat_interleave(16 // request.param + 1, 0)[:16].T[:, None]
    return images


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=0)


BOXES = [[0, 0, 16, 16], [3, 1, 5, 7], [0, 15, 1, 1], [2, 2, 11, 9], [9, 8, 7, 8]]
BOXES += [[0, 0, 2, 16], [1, 0, 15, 15], [5, 5, 3, 3], [4, 0, 12, 6]]


@pytest.mark.parametrize("size", [16, 8, 24, 5])
def test_crop_resize_and_flip(vision, batch, size):
    flip = torch.arange(9) % 2 == 1
    ours = pixels.crop_resize(batch, torch.tensor(BOXES), size, flip)
    theirs = [vision.resized_crop(image, *box, [size, size], antialias=True) for image, box in zip(batch, BOXES, strict=True)]
    close(ours, [vision.horizontal_flip(image) if turned else image for image, turned in zip(theirs, flip, strict=True)])


@pytest.mark.parametrize(("name", "low", "high"), [("brightness", 0, 2), ("contrast", 0, 2), ("saturation", 0, 2), ("hue", -0.5, 0.5)])
def test_colour(vision, batch, name, low, high):
    amounts = torch.linspace(low, high, 9)
    for order in (amounts, amounts.flip(0)):
        ours = getattr(pixels, f"adjust_{name}")(batch, order)
        reference = getattr(vision, f"adjust_{name}")
        close(ours, [reference(image, amount.item()) for image, amount in zip(batch, order, strict=True)])


def test_grey_and_solarise(vision, batch):
    close(pixels.grey(batch), [vision.rgb_to_grayscale(image) for image in batch])
    close(pixels.solarise(batch), [vision.solarize(image, 0.5) for image in batch])


@pytest.mark.parametrize("size", [16, 64])
def test_blur(vision, size):
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 2, 5)
    kernel = [pixels.blur_kernel_size(size)] * 2
    close(
        pixels.gaussian_blur(images, sigma), [vision.gaussian_blur(i, kernel, [s.item()] * 2) for i, s in zip(images, sigma, strict=True)]
    )


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (16, 3), (32, 3), (64, 7), (224, 23)])
def test_blur_kernel_is_a_tenth_of_the_image(size, kernel):
    assert pixels.blur_kernel_size(size) == kernel
