"""Trained models out of a run: which blobs make up a checkpoint, which may go, and an encoder for others to load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from lwfed import __version__, disk
from lwfed.backbones import CONVOLUTIONAL
from lwfed.config import ModelSection, RunConfig
from lwfed.errors import StateError
from lwfed.plan import HEADS
from lwfed.wire import tensors

Checkpoints = Mapping[tuple[int, int], Mapping[str, str]]  # (stage, round) -> part -> blob


def choose(checkpoints: Checkpoints, stage: int | None) -> tuple[int, Mapping[str, str]]:
    """(stage, parts) of the last checkpoint, or of the last one of `stage`. Raises StateError when there is none."""
    stages = {place[0]: parts for place, parts in sorted(checkpoints.items())}
    if not stages:
        raise StateError("there is nothing to export yet: the first round is not finished; see `cloud-server status`")
    wanted = max(stages) if stage is None else stage
    if wanted not in stages:
        raise StateError(f"there is no model of stage {wanted} yet; stages with one: {', '.join(map(str, sorted(stages)))}")
    return wanted, stages[wanted]


def export(config: RunConfig, stage: int, parts: Mapping[str, str], find: Callable[[str], Path], out: Path) -> None:
    """Write the encoder (stem, layers, adapter, norm) as one safetensors file with timm's names; the same model gives the same bytes.

    Its metadata holds under ``lwfed`` (JSON): run, stage, ``config_sha256``, ``model`` and ``seed`` as in the configuration, how
    timm makes the model and how pixels are normalised. timm's model is ``timm.create_model(**about["timm"])``, in which the modules
    ``about["without"]`` give way to torch.nn.Identity: what the encoder does not have. An adapter is nothing of timm's.
    `find` gives the file of a blob. Raises StateError when `out` cannot be written.
    """
    heads = HEADS[config.ssl.method]
    encoder = [part for part in parts if part not in heads]
    layers = sum(part.startswith("layer.") for part in encoder)
    found: dict[str, npt.NDArray[np.float32]] = {}
    for part in encoder:
        found |= tensors.read(find(parts[part]))
    about = {
        "version": __version__,
        "run": config.run.name,
        "strategy": config.stages.strategy,
        "stage": stage,
        "config_sha256": config.digest,
        "model": config.model.model_dump(mode="json"),
        "seed": config.run.seed,
        "timm": timm_arguments(config.model, layers),
        "without": without(config.model, layers),
        "input": {"mean": 0.5, "std": 0.5},  # of pixels in [0, 1], in every channel
    }
    # One key only: the format does not fix the order of several.
    data = save({name: found[name] for name in sorted(found)}, metadata={"lwfed": json.dumps(about, sort_keys=True)})
    _write(out, data)


def timm_arguments(model: ModelSection, layers: int) -> dict[str, Any]:
    """Of ``timm.create_model``, for an encoder of so many layers."""
    if model.backbone in CONVOLUTIONAL:
        return {"model_name": model.backbone, "num_classes": 0, "in_chans": model.channels}
    return {
        "model_name": "vit_tiny_patch16_224",  # any will do: all that distinguishes them follows
        "num_classes": 0,
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": model.channels,
        "embed_dim": model.width,
        "depth": layers,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "class_token": model.pooling == "token",
        "global_pool": "token" if model.pooling == "token" else "avg",
    }


def without(model: ModelSection, layers: int) -> list[str]:
    """Modules of timm's model that an encoder of so many layers does not have."""
    traits = CONVOLUTIONAL.get(model.backbone)
    return [*traits.names[layers:], *traits.after] if traits else []


def _write(out: Path, data: bytes) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f".{out.name}-{os.getpid()}")
        unfinished.write_bytes(data)
        disk.install(unfinished, out)
    except OSError as error:
        raise StateError(f"cannot write {out}: {error.strerror or error}") from error
