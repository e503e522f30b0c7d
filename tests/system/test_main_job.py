"""Server, broker and agents as processes on real images."""

import hashlib
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file


def run_through(fleet):
    """A whole run without disturbance; (server, devices) with the server still open for questions."""
    server = fleet.server()
    devices = []
    for number in (1, 2):
        devices.append(fleet.device(number))
        server.wait_for("device", participant=number - 1)
    return server, devices


def digest_of_result(server):
    path = Path(server.wait_for("finished")["encoder"])
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "broker",
    [
        "embedded",
        pytest.param(
            "mosquitto",
            marks=pytest.mark.skipif(
                shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None, reason="mosquitto is not installed"
            ),
        ),
    ],
)
def test_a_fleet_trains_stage_by_stage(fleet, broker):
    server, devices = run_through(fleet(broker=broker))
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
    for device in devices:
        assert device.end(signal.SIGTERM) == 0
        assert not device.errors


def test_killed_devices_and_a_killed_server_change_no_bit_of_the_result(fleet):
    server, devices = run_through(fleet("undisturbed"))
    undisturbed = digest_of_result(server)
    assert server.result() == 0
    for device in devices:
        device.end()

    disturbed = fleet("disturbed")
    server, devices = run_through(disturbed)
    devices[0].wait_for("training")
    devices[0].end(signal.SIGKILL)
    devices[0] = disturbed.device(1)
    server.wait_for("round", stage=1, round=1, status="closed")
    server.end(signal.SIGKILL)
    server = disturbed.server()
    assert server.wait_for("run", status="resumed")
    assert digest_of_result(server) == undisturbed
    assert server.result() == 0
    for device in devices:
        assert device.end() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_idle_agent_is_one_small_process(fleet):
    idle = fleet("idle", settings=["rounds.min_devices=3", "data.devices=3"])
    server = idle.server()
    server.wait_for("waiting")
    device = idle.device(1)
    server.wait_for("device", status="joined")
    process = psutil.Process(device.process.pid)
    assert process.children() == []
    assert process.memory_info().rss < 60e6
