"""Decoded images, and how one image becomes the array that models read."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lwfed.data.kept import KeptPixels
from lwfed.data.scan import open_image

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    pixels: Pixels | KeptPixels  # [N, C, H, W]
    labels: Labels | None  # [N], indices into `classes`
    classes: tuple[str, ...]
    skipped: int = 0  # files that look like images but cannot be read

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Shape:
    size: int  # pixels of a side
    channels: int  # 3: RGB, 1: grey


def read(path: Path, shape: Shape) -> Pixels | None:
    """The image in `path` as [C, H, W], upright by its EXIF orientation, squeezed into the square; None if unreadable."""
    try:
        with warnings.catch_warnings(), open_image(path) as image:
            warnings.simplefilter("ignore")
            image.draft("RGB", (2 * shape.size, 2 * shape.size))  # JPEG: decode a camera's 12 megapixels at 1/8 of the cost
            return to_array(ImageOps.exif_transpose(image), shape)
    except Exception:  # Pillow's decoders raise nearly anything on broken files
        return None


def to_array(image: Image.Image, shape: Shape) -> Pixels:
    """[C, H, W], resized bilinearly. Raises ValueError for pixels without a known range (32-bit float TIFF)."""
    if image.mode == "F":
        raise ValueError("pixels of unknown range")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip to white
        image = Image.fromarray(np.clip(np.asarray(image, dtype=np.int64) >> 8, 0, 255).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    resized = image.convert("RGB" if shape.channels == 3 else "L").resize((shape.size, shape.size), Image.Resampling.BILINEAR)
    array = np.asarray(resized, dtype=np.uint8)
    return np.ascontiguousarray(array.transpose(2, 0, 1)) if shape.channels == 3 else array[None].copy()


def resize_all(arrays: Iterable[npt.NDArray[np.uint8]], count: int, shape: Shape) -> Pixels:
    """`count` images, [H, W] grey or [H, W, 3] colour -> [count, C, size, size]."""
    pixels = np.empty((count, shape.channels, shape.size, shape.size), np.uint8)
    for index, image in enumerate(resize_each(arrays, shape)):
        pixels[index] = image
    return pixels


def resize_each(arrays: Iterable[npt.NDArray[np.uint8]], shape: Shape) -> Iterator[Pixels]:
    """The same one by one, each [C, size, size]."""
    for array in arrays:
        yield to_array(Image.fromarray(array), shape)
