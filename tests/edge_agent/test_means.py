"""How a device computes a stage: chosen within its memory, kept over rounds, the same in every repetition."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch

from lwfed.config import load_config
from lwfed.edge_agent import worker
from lwfed.edge_agent.means import find_means
from lwfed.edge_agent.worker import Worker
from lwfed.errors import StateError, Unfit
from lwfed.models import fitting
from lwfed.models.initial import init_parts
from lwfed.models.reuse import forget
from lwfed.plan import by_part
from lwfed.wire import tensors as wire

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
    reason="ONNX Runtime is not installed: pip install 'lwfed[onnx]'",
)
SMALL = ["model={image_size: 8, patch_size: 4, width: 32, heads: 2, depth: 3}", "ssl={hidden_dim: 8, output_dim: 8}", "train.epochs=1"]
AMPLE_MB = 1e6
REUSED = ["train.prefix=torch", "train.views_per_round=1", "stages.rounds_per_stage=3", "calibration.every=never"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config(*settings):
    return load_config("demo", [*SMALL, *settings])


def means(made, stage, tmp_path, budget_mb=AMPLE_MB):
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    return find_means(made, stage, init_parts(made, made.plan(stage).present), images, budget_mb, tmp_path / "graphs")


def test_where_nothing_is_frozen_torch_does_it_all(tmp_path):
    found = means(config("train.prefix=auto"), 1, tmp_path)
    assert (found.engine, found.micro_batch, found.reason) == ("torch", 20, "no layer is frozen")


def test_a_backbone_with_batch_statistics_says_why_batches_stay_whole(tmp_path):
    made = load_config("resnet18", ["model.image_size=8", "train.prefix=torch", "train.micro_batch=auto"])
    found = means(made, 1, tmp_path)
    assert found.micro_batch == 20
    assert found.reason.endswith("; batches whole, for this backbone has statistics of the batch")


@needs_onnx
@pytest.mark.parametrize("engine", ["onnx", "onnx_int8"])
def test_an_engine_that_is_asked_for_is_used(tmp_path, engine):
    found = means(config(f"train.prefix={engine}", "train.micro_batch=4"), 3, tmp_path)
    assert (found.engine, found.micro_batch, found.means.prefix.engine) == (engine, 4, engine)


@needs_onnx
def test_auto_says_how_fast_each_is(tmp_path):
    found = means(config("train.prefix=auto"), 3, tmp_path)
    assert all(f"{engine} " in found.reason for engine in ("torch", "onnx", "onnx_int8"))


def test_without_onnx_runtime_training_goes_on_with_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    found = means(config("train.prefix=onnx"), 3, tmp_path)
    assert found.engine == "torch"
    assert "pip install 'lwfed[onnx]'" in found.reason


def test_a_budget_below_the_process_itself_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(Unfit, match=r"stage 2: .*room for 0 MB; raise --memory-budget or lower train\.batch_size"):
        means(config(), 2, tmp_path, budget_mb=1)


class Device:
    """Training processes on the same folder; those of `fresh` remember nothing."""

    def __init__(self, root, made, stage):
        self.config, self.root, self.stage = made, root, stage
        self.planned, self.reasons, self.worker = [], [], Worker()
        (root / "config").write_bytes(made.to_bytes())
        self.parts = {}
        for part, held in by_part(init_parts(made, made.plan(stage).present)).items():
            self.parts[part] = str(root / part)
            (root / part).write_bytes(wire.encode({name: tensor.numpy() for name, tensor in held.items()}))

    def train(self, round, execution=None, fresh=False, budget_mb=None):
        order = {
            "do": "train", "config": str(self.root / "config"), "parts": self.parts, "stage": self.stage, "round": round, "participant": 0,
            "lr_scale": 1.0, "data": "digits", "shared": False, "kept": str(self.root / "kept"), "out": str(self.root / "out"),
            "execution": execution, "budget_mb": budget_mb, "after": round - 1 or None,
        }  # fmt: skip
        (Worker() if fresh else self.worker).handle(order, self.hear)
        return (self.root / "out").read_bytes()

    def hear(self, said):
        if said["event"] == "planned":
            self.planned.append({name: said[name] for name in ("prefix", "micro_batch")})
            self.reasons.append(said["reason"])


@needs_onnx
@pytest.mark.parametrize("prefix", ["torch", "onnx_int8"])
def test_a_repetition_in_another_process_gives_the_same_bits(tmp_path, prefix):
    device = Device(tmp_path, config(f"train.prefix={prefix}", "train.micro_batch=16"), 3)
    first, second = device.train(1), device.train(2, {"prefix": prefix, "micro_batch": 16})
    assert device.train(2, device.planned[0], fresh=True) == second != first
    assert device.planned == [{"prefix": prefix, "micro_batch": 16}] * 3


@needs_onnx
def test_an_engine_is_made_once_a_stage_and_anew_for_other_weights(tmp_path, monkeypatch):
    made = []
    find = worker.find_means
    monkeypatch.setattr(worker, "find_means", lambda *given: made.append(1) or find(*given))
    device = Device(tmp_path, config("train.prefix=onnx"), 2)
    device.train(1)
    device.train(2, device.planned[0])
    assert len(made) == 1
    calibrated = tmp_path / "calibrated"
    calibrated.write_bytes((tmp_path / "layer.1").read_bytes())
    device.parts["layer.1"] = str(calibrated)
    device.train(3, device.planned[0])
    assert len(made) == 2
    device.train(3, {**device.planned[0], "micro_batch": 5})
    assert len(made) == 3
    assert device.planned[-1]["micro_batch"] == 5


def test_what_an_earlier_round_has_fixed_wins_over_the_configuration(tmp_path):
    device = Device(tmp_path, config("train.prefix=torch", "train.micro_batch=16"), 2)
    device.train(1, {"prefix": "torch", "micro_batch": 3})
    assert device.planned == [{"prefix": "torch", "micro_batch": 3}]


class Disk:
    """Writing updates fails as long as more than `free` bytes of features are kept."""

    def __init__(self, monkeypatch, device, free):
        self.features, self.write, self.free = device.root / "kept" / "features", worker.write_durably, free
        monkeypatch.setattr(worker, "write_durably", self)

    def __call__(self, path, data):
        if sum(file.stat().st_size for file in self.features.glob("*")) > self.free:
            raise OSError(28, "No space left on device")
        self.write(path, data)


def test_features_give_way_to_the_update_on_a_full_disk(tmp_path, monkeypatch):
    device = Device(
        tmp_path, config("train.prefix=torch", "train.views_per_round=1", "stages.rounds_per_stage=3", "calibration.every=never"), 3
    )
    expected = device.train(1)
    assert list((tmp_path / "kept" / "features").iterdir())
    Disk(monkeypatch, device, free=0)
    assert device.train(1) == expected
    assert not list((tmp_path / "kept" / "features").iterdir())
    Disk(monkeypatch, device, free=-1)
    with pytest.raises(StateError, match=r"model and update cannot be written to .* \(No space left on device\): free some disk space"):
        device.train(2)


def test_features_leave_room_for_the_update(tmp_path, monkeypatch):
    device = Device(
        tmp_path, config("train.prefix=torch", "train.views_per_round=1", "stages.rounds_per_stage=3", "calibration.every=never"), 3
    )
    update = len(device.train(1))
    forget(tmp_path / "kept" / "features")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2.5 * update))
    device.train(2)
    assert sum(file.stat().st_size for file in (tmp_path / "kept" / "features").iterdir()) <= 0.5 * update


def test_what_has_no_room_any_more_is_computed_with_fewer_images_at_a_time(tmp_path, monkeypatch):
    """Only where an earlier round has fixed how many, and not the configuration."""
    monkeypatch.setattr(fitting, "micro_batch", lambda config, *_: 2 if config.train.micro_batch == "auto" else refuse())

    def refuse():
        raise Unfit("there is room for 9 MB")

    fixed = {"prefix": "torch", "micro_batch": 3}
    device = Device(tmp_path, config("train.prefix=torch"), 2)
    device.train(1, fixed)
    assert device.planned == [{"prefix": "torch", "micro_batch": 2}]
    assert "not as before, for stage 2: there is room for 9 MB" in device.reasons[0]
    with pytest.raises(Unfit, match="room for 9 MB"):
        Device(tmp_path, config("train.prefix=torch", "train.micro_batch=3"), 2).train(1, fixed)
