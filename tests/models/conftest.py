import numpy as np
import pytest
import torch

from lwfed.config import load_config


def _torchvision_without_compiled_operators():
    """A torchvision built for another torch lacks its operators, without which it cannot be imported; no test needs them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library  # its registrations end with it
    return None


_LIBRARY = _torchvision_without_compiled_operators()
torch.set_num_threads(1)

TINY = [
    "model={image_size: 8, patch_size: 4, width: 16, depth: 3, heads: 2}",
    "ssl={hidden_dim: 12, output_dim: 8}",
    "train.batch_size=8",
]


@pytest.fixture
def tiny():
    """A configuration small enough for hundreds of steps a second; takes settings on top."""
    return lambda *settings: load_config("base", [*TINY, *settings])


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)


@pytest.fixture
def device(tiny, images, tmp_path):
    """A device with 20 images that uses views again; takes settings, or a configuration."""
    from .reusing import Device

    def device(*settings, config=None):
        return Device(config or tiny("train={epochs: 1, views_per_round: 2}", *settings), images, tmp_path / "features")

    return device
