"""Server, broker and agents as processes on real images."""

import signal
import sys
from importlib.util import find_spec

import psutil
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lwfed.cloud_server.broker import find_mosquitto

from .conftest import FEW_IMAGES

ENGINE = "onnx" if all(find_spec(name) for name in ("onnx", "onnxruntime")) else "torch"


MOSQUITTO = [
    pytest.mark.slow,  # test_kills has a whole run over mosquitto
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]


@pytest.mark.parametrize("broker", ["embedded", pytest.param("mosquitto", marks=MOSQUITTO)])
def test_a_fleet_trains_stage_by_stage(fleet, broker, tmp_path, monkeypatch):
    """Frozen layers in ONNX Runtime, by the server's graphs: devices have no package onnx.

    While one waits it is one small process; of the images of the other two are broken, which are skipped, counted and said.
    """
    running = fleet(broker=broker, settings=[*FEW_IMAGES, f"train.prefix={ENGINE}"])
    server = running.server()
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "onnx.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
    devices = [running.device(1)]
    server.wait_for("device", participant=0)
    assert_is_one_small_process(devices[0])
    devices.append(running.device(2, photos_of_which_two_are_broken(tmp_path / "photos")))
    server.wait_for("device", participant=1)
    for stage in (1, 2):
        for number in (1, 2):
            server.wait_for("round", stage=stage, round=number, status="closed", devices=2)
        ended = server.wait_for("stage", stage=stage, status="ended")
        assert ended["worker_peak_mb"] >= ended["worker_baseline_mb"] > 50
        assert ended["bytes_down"] > 0
        assert ended["bytes_up"] > 0
        assert 0 < ended["knn"] <= 1
    encoder = load_file(server.wait_for("finished")["encoder"])
    assert {name.split(".")[0] for name in encoder} == {"patch_embed", "pos_embed", "blocks", "fc_norm"}
    assert "blocks.1.attn.qkv.weight" in encoder
    assert server.result() == 0
    names = {said["name"] for said in server.said if said["event"] == "evaluation"}
    assert names == {"random", "raw_pixels", "trained"}
    update = devices[1].wait_for("update")["text"]
    assert "over 12 images" in update
    assert "(2 unreadable)" in update
    for device in devices:
        device.wait_for("planned", stage=2, prefix=ENGINE)
        assert device.end(signal.SIGTERM) == 0
        assert not device.errors


def assert_is_one_small_process(agent):
    if sys.platform == "linux":  # /proc is read
        process = psutil.Process(agent.process.pid)
        assert process.children() == []
        assert process.memory_info().rss < 60e6


def photos_of_which_two_are_broken(folder):
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (20, 16), (20 * number, 100, 50)).save(folder / f"{number}.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:40])
    (folder / "text.jpg").write_text("no image")
    return folder
