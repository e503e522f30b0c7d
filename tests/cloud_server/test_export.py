"""Encoders of every backbone and stage, exported and loaded by timm as docs/BACKBONES.md says."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lwfed.backbones import CONVOLUTIONAL
from lwfed.cloud_server.checkpoint import export
from lwfed.config import load_config
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.models.backbones import load_encoder
from lwfed.models.shapes import part_shapes
from lwfed.wire import tensors as wire


def drawn(name, shape, random):
    """Of ordinary size, and positive where it must be."""
    value = random.normal(scale=np.prod(shape[1:]) ** -0.5, size=shape).astype(np.float32)
    return np.abs(value) + 0.5 if name.endswith("running_var") else value


def exported(config, stage, folder):
    random, parts = np.random.default_rng(0), config.plan(stage).present
    for part in parts:
        shapes = part_shapes(config, part)
        (folder / part).write_bytes(wire.encode({name: drawn(name, shape, random) for name, shape in shapes.items()}))
    export(config, stage, {part: part for part in parts}, lambda blob: folder / blob, folder / "encoder.safetensors")
    with safe_open(folder / "encoder.safetensors", framework="numpy") as file:
        return json.loads(file.metadata()["lwfed"]), load_file(folder / "encoder.safetensors")


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        (["model.backbone=vit", "model.pooling=token", "model.mlp_ratio=2.6"], 2),
        (["model.backbone=vit", "ssl.method=mae"], 4),
        *((["model.backbone=" + name], stage) for name, traits in CONVOLUTIONAL.items() for stage in range(1, traits.depth + 1)),
        (["model.backbone=resnet18", "model.channels=1"], 4),
    ],
    ids=str,
)
def test_timm_loads_what_was_exported_and_computes_the_same(tmp_path, settings, stage):
    import_torchvision()  # which timm needs, in whatever condition
    import timm

    config = load_config("demo", ["model.image_size=32", *settings])
    about, tensors = exported(config, stage, tmp_path)
    encoder = timm.create_model(**about["timm"])
    for name in about["without"]:
        encoder.set_submodule(name, torch.nn.Identity())
    missing, surplus = encoder.load_state_dict(tensors, strict=False)
    assert (missing, sorted({name.rpartition(".")[0] for name in surplus})) == (
        [],
        [p for p in config.plan(stage).present if "adapter" in p],
    )
    images = torch.rand(2, config.model.channels, 32, 32)
    found = encoder.eval()((images - about["input"]["mean"]) / about["input"]["std"])
    if surplus:
        found = found @ tensors[f"adapter.{stage}.weight"].T + tensors[f"adapter.{stage}.bias"]
    torch.testing.assert_close(found, load_encoder(config.model, tensors)(images), rtol=1e-4, atol=1e-4)
    assert found.std() > 1e-3
