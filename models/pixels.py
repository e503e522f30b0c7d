"""Batched image transforms with one parameter per sample, equal to torchvision's on each sample.

Images are float32 [B, C, H, W] in [0, 1] with C = 1 or 3. Per image, torchvision costs 0.6 to 0.9 ms a view, a large
part of a training step on a device; whole batches cost a fraction of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision's


def resize_weights(start: Tensor, length: Tensor, inward: int, outward: int) -> Tensor:
    """Matrices [B, outward, inward] that resize pixels start .. start + length - 1 of `inward` to `outward` pixels.

    Bilinear: a triangle, as wide as the step between two output pixels where that exceeds a pixel (antialias).
    start, length [B] integers.
    """
    step = (length / outward)[:, None, None]
    centre = start[:, None, None] + (torch.arange(outward, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(inward, device=start.device)
    weight = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp(min=0)  # [B, outward, inward]
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])  # [B, inward]
    weight = weight * inside[:, None]
    return weight / weight.sum(dim=2, keepdim=True)


def crop_resize(images: Tensor, boxes: Tensor, size: int, flip: Tensor | None = None) -> Tensor:
    """Crop boxes [B, 4] (top, left, height, width; integers) and resize them to size x size, mirrored where `flip` [B] says so."""
    rows = resize_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    resized = images.flatten(1, 2) @ columns.transpose(1, 2)  # all channels of an image in one product
    return rows[:, None] @ resized.view(*images.shape[:3], size)


def grey(images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * _per_image(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else _blend(images, grey(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` [B] of a full turn, in [-0.5, 0.5]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    # Which colour is the brightest, as numbers: selecting with torch.where, and %, take several times as long.
    is_red = (value == red).to(images.dtype)
    is_green = (value == green).to(images.dtype) * (1 - is_red)
    is_blue = 1 - is_red - is_green
    difference = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    hue = difference / chroma.clamp(min=1e-30) + 2 * is_green + 4 * is_blue + 6 * shift[:, None, None]
    # HSV to RGB without cases: f(n) = V - C * max(0, min(k, 4 - k, 1)), k = (n + H / 60 degrees) mod 6.
    k = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None] + hue[:, None]
    k = k - 6 * (k / 6).floor()
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_kernel_size(size: int) -> int:
    """Pixels, odd: a tenth of the image, as SimCLR's, and at least 3."""
    return max(3, 2 * (size // 20) + 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Separable blur with reflected borders; sigma [B] in pixels, above 0."""
    kernel_size = blur_kernel_size(images.shape[2])
    half = kernel_size // 2
    offsets = torch.arange(-half, half + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # [B, kernel_size]
    padded = F.pad(images, (half, half, half, half), mode="reflect")
    for axis in (2, 3):
        length = padded.shape[axis] - 2 * half
        padded = sum((_per_image(kernel[:, tap]) * padded.narrow(axis, tap, length) for tap in range(kernel_size)), torch.zeros(()))
    return padded


def solarise(images: Tensor) -> Tensor:
    """Invert pixels from one half up."""
    return torch.minimum(images, 1 - images)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    weight = _per_image(factor)
    return (weight * images + (1 - weight) * other).clamp(0, 1)
