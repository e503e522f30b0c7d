"""Where a device keeps features of views that are used again, and when they go."""

import math
import shutil

import pytest

from lwfed.edge_agent import worker
from lwfed.edge_agent.means import Found
from lwfed.errors import StateError
from lwfed.models import fitting
from lwfed.models.features import Folder
from lwfed.models.step import Means

from .planning import REUSED, Device, config, means, needs_onnx

pytestmark = pytest.mark.usefixtures("unmeasured", "one_thread")


class Disk:
    """Writing updates fails as long as more than `free` bytes of features are kept."""

    def __init__(self, monkeypatch, device, free):
        self.features, self.write, self.free = device.root / "kept" / "features", worker.disk.write, free
        monkeypatch.setattr(worker.disk, "write", self)

    def __call__(self, path, data):
        if sum(file.stat().st_size for file in self.features.glob("*")) > self.free:
            raise OSError(28, "No space left on device")
        self.write(path, data)


def test_features_give_way_to_the_update_on_a_full_disk(tmp_path, monkeypatch):
    device = Device(tmp_path, config(*REUSED), 3)
    expected = device.train(1)
    assert list((tmp_path / "kept" / "features").iterdir())
    Disk(monkeypatch, device, free=0)
    assert device.train(1) == expected
    assert not list((tmp_path / "kept" / "features").iterdir())
    Disk(monkeypatch, device, free=-1)
    with pytest.raises(StateError, match=r"model and update cannot be written to .* \(No space left on device\): free some disk space"):
        device.train(2)


def test_features_in_memory_are_counted_in_what_a_stage_needs(tmp_path):
    reused = config(*REUSED)
    in_file, in_memory = means(reused, 3, tmp_path), means(config(*REUSED, "train.features_in=memory"), 3, tmp_path)
    bytes_ = 20 * 2 * (4 * 32 * 2 + 4)  # images, views, tokens, width, float16, CRC-32
    assert (in_file.features_bytes, in_memory.features_bytes) == (0, bytes_)
    assert "memory" not in in_file.reason + in_memory.reason
    assert means(config(*REUSED, "train.features_in=memory", "train.features_as=int8"), 3, tmp_path).features_bytes == 20 * 2 * (
        (4 + 2) * 32 + 4
    )
    assert means(config(*REUSED, "train.features_in=memory"), 1, tmp_path).features_bytes == 0, "nothing is frozen"


def test_features_go_to_a_file_where_memory_has_no_room_beside_training(tmp_path, monkeypatch):
    made = config(*REUSED, "train.features_in=memory", "train.micro_batch=4")
    need = fitting.Need(fixed=1e6, per_image=1e5, batch_size=8, features=5e6)
    monkeypatch.setattr(fitting, "measure", lambda *_: need)
    monkeypatch.setattr(fitting, "CODE_BYTES", 0.0)
    monkeypatch.setattr(fitting, "code_bytes", lambda *_: 0.0)
    for room, features in ((need.of(4) + 5e6, 5e6), (need.of(4) + 4.9e6, 0)):
        monkeypatch.setattr("lwfed.edge_agent.means._Search._memory", lambda _, room=room: (1e8, room))
        found = means(made, 3, tmp_path)
        assert (found.micro_batch, found.features_bytes) == (4, features)
        assert found.needs_mb == pytest.approx((1e8 + need.of(4) + features) / 1e6)
        assert found.reason.endswith("; features in a file, for memory has no room for them") == (not features)


def test_features_in_memory_live_as_long_as_the_plan_of_their_stage(tmp_path):
    reused = (*REUSED, "transfer.codec=fp32")  # so that a round is the same whatever came before it
    expected = Device(tmp_path, config(*reused), 3).train(2)
    folder = tmp_path / "kept" / "features"
    assert list(folder.iterdir())
    device = Device(tmp_path, config(*reused, "train.features_in=memory"), 3)
    device.train(1)
    assert not list(folder.iterdir()), "what was there is of no use"
    held = device.worker._memory
    assert [held.size(name) for name in held.names()] == [device.images * 2 * (4 * 32 * 2 + 4)]
    assert device.train(2, device.planned[0]) == expected
    assert device.worker._memory is held
    (tmp_path / "calibrated").write_bytes((tmp_path / "layer.1").read_bytes())
    device.parts["layer.1"] = str(tmp_path / "calibrated")
    device.train(3, device.planned[0])
    assert device.worker._memory is not held


@needs_onnx
def test_what_takes_the_least_memory_leaves_onnx_runtime_and_memory_for_features_alone(tmp_path, graphs):
    device = Device(tmp_path, config(*REUSED, "train.prefix=onnx", "train.features_in=memory"), 3, graphs)
    device.train(1)
    assert (device.planned[0]["prefix"], device.worker._memory is None) == ("onnx", False)
    least = {"prefix": "torch", "micro_batch": 4, "features_in": "file"}
    device.train(2, least)
    assert device.planned[1] == {"prefix": "torch", "micro_batch": 4}
    assert device.worker._memory is None
    assert list((tmp_path / "kept" / "features").iterdir())
    found = device.worker._found[1]
    assert (found.means.prefix, found.features_bytes) == (None, 0)
    device.train(3, least)
    assert device.worker._found[1] is found, "one plan for the stage"


def test_features_that_another_engine_or_micro_batch_gave_are_computed_anew_and_that_is_said(tmp_path):
    for stage, size, said in ((2, 4, 0), (3, 4, 0), (3, 8, 1), (3, 8, 0)):
        device = Device(tmp_path, config(*REUSED, f"train.micro_batch={size}"), stage)
        device.train(1)
        assert len(device.recomputes) == said
    device.train(2, {"prefix": "torch", "micro_batch": 2})
    assert device.recomputes[0].endswith(
        "those kept are by torch with 8 images at a time, and not by torch with 2 images at a time, which rounds otherwise"
    )


def test_features_leave_room_for_the_update(tmp_path, monkeypatch):
    device = Device(tmp_path, config(*REUSED), 3)
    update = len(device.train(1))
    Folder(tmp_path / "kept" / "features").forget()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2.5 * update))
    device.train(2)
    assert sum(file.stat().st_size for file in (tmp_path / "kept" / "features").iterdir()) <= 0.5 * update


@pytest.mark.parametrize(("kind", "budget_mb", "room"), [("ext4", 310.0, math.inf), ("tmpfs", 310.0, 1e7), ("tmpfs", 200.0, 0.0)])
def test_files_that_are_memory_get_what_training_leaves_of_the_budget(tmp_path, monkeypatch, kind, budget_mb, room):
    monkeypatch.setattr(worker, "filesystem", lambda _: kind)
    assert worker._left_on(tmp_path, budget_mb, Found(Means(), "", needs_mb=300.0)) == room


def test_without_a_budget_files_in_memory_get_a_share_of_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "filesystem", lambda _: "tmpfs")
    monkeypatch.setattr(worker, "own_share_bytes", lambda: 5e6)
    monkeypatch.setattr(worker, "resident_mb", lambda: 300.0)
    assert worker._left_on(tmp_path, None, Found(Means(), "", needs_mb=302.0)) == 3e6


@pytest.mark.parametrize(("budget_mb", "remedy"), [(None, "free some"), (4000.0, "raise --memory-budget")])
def test_features_keep_to_what_is_left_for_files_in_memory_and_say_that_it_is_memory(tmp_path, monkeypatch, budget_mb, remedy):
    monkeypatch.setattr(worker, "_left_on", lambda *_: 0.0)
    device = Device(tmp_path, config(*REUSED), 3)
    device.train(1, budget_mb=budget_mb)
    assert sum(file.stat().st_size for file in (tmp_path / "kept" / "features").iterdir()) == 0
    assert device.recomputes[-1].endswith(f"are computed each time; its files are memory: {remedy}")
