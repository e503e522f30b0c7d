"""What tests of a device's plans share: a small model, memory as a test says, and training processes on one folder."""

import importlib.util

import numpy as np
import pytest

from lwfed.config import load_config
from lwfed.edge_agent.means import _Search, find_means
from lwfed.edge_agent.worker import Worker
from lwfed.models import fitting
from lwfed.models.initial import init_parts
from lwfed.models.prefix import SESSIONS
from lwfed.plan import by_part
from lwfed.wire import tensors as wire

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
    reason="ONNX Runtime is not installed: pip install 'lwfed[onnx]'",
)
SMALL = [
    "model={image_size: 8, patch_size: 4, width: 32, heads: 2, depth: 3}", "ssl={hidden_dim: 8, output_dim: 8}", "train.epochs=1",
    "data={partition: even, devices: 30}",
]  # fmt: skip
AMPLE_MB = 1e6
REUSED = ["train.prefix=torch", "train.views_per_round=1", "stages.rounds_per_stage=3", "calibration.every=never"]


def config(*settings):
    return load_config("demo", [*SMALL, *settings])


def means(made, stage, graphs=None, budget_mb=AMPLE_MB):
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    return find_means(made, stage, init_parts(made, made.plan(stage).present), images, budget_mb, graphs or {})


class Room:
    """Memory as a test says, in which libraries and ONNX Runtime take nothing; `search` plans the last stage."""

    def __init__(self, monkeypatch, prefix, micro_batch=4):
        monkeypatch.setattr(fitting, "CODE_BYTES", 0.0)
        monkeypatch.setattr(fitting, "code_bytes", lambda *_: 0.0)
        monkeypatch.setattr(fitting, "mapped_by", lambda run: self.mapped)
        monkeypatch.setattr("lwfed.edge_agent.means.ONNX_BYTES", 0.0)
        monkeypatch.setattr("lwfed.edge_agent.means._Search._memory", lambda _: (0.0, self.bytes))
        self.config = config(f"train.prefix={prefix}", f"train.micro_batch={micro_batch}", "train.batch_size=20")
        self.bytes, self.mapped = AMPLE_MB * 1e6, 0.0

    def needs(self, engine, beside=0.0, micro_batch=4):
        images = np.zeros((20, 3, 8, 8), dtype=np.uint8)
        search = _Search(self.config, 3, init_parts(self.config, self.config.plan(3).present), images, AMPLE_MB)
        return search._need(engine, beside + SESSIONS.get(engine, 0.0) * search._frozen_bytes).of(micro_batch)


class Device:
    """Training processes on the same folder; those of `fresh` remember nothing."""

    def __init__(self, root, made, stage, graphs=None):
        self.config, self.root, self.stage = made, root, stage
        self.graphs = {engine: str(file) for engine, file in (graphs or {}).items()}
        self.planned, self.reasons, self.recomputes, self.worker = [], [], [], Worker()
        (root / "config").write_bytes(made.to_bytes())
        self.parts = {}
        for part, held in by_part(init_parts(made, made.plan(stage).present)).items():
            self.parts[part] = str(root / part)
            (root / part).write_bytes(wire.encode({name: tensor.numpy() for name, tensor in held.items()}))

    def order(self, round, execution=None, budget_mb=None):
        return {
            "do": "train", "config": str(self.root / "config"), "parts": self.parts, "graphs": self.graphs, "stage": self.stage,
            "round": round, "participant": 0, "lr_scale": 1.0, "data": "digits", "shared": False, "kept": str(self.root / "kept"),
            "out": str(self.root / "out"), "execution": execution, "budget_mb": budget_mb, "after": round - 1 or None,
        }  # fmt: skip

    def train(self, round, execution=None, fresh=False, budget_mb=None):
        (Worker() if fresh else self.worker).handle(self.order(round, execution, budget_mb), self.hear)
        return (self.root / "out").read_bytes()

    def hear(self, said):
        if said["event"] == "planned":
            self.planned.append({name: said[name] for name in ("prefix", "micro_batch")})
            self.reasons.append(said["reason"])
        if said["event"] == "done":
            self.images = said["images"]
        if said["event"] == "recomputes":
            self.recomputes.append(said["why"])
