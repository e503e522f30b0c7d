"""How a stage is computed holds for its rounds, in whatever process, until there is no room for it."""

import json
import subprocess
import sys

import pytest
import torch

from lwfed.edge_agent import means as module
from lwfed.edge_agent import worker
from lwfed.errors import Unfit
from lwfed.models import fitting

from .planning import REUSED, Device, Room, config, needs_onnx

pytestmark = pytest.mark.usefixtures("unmeasured", "one_thread")


@needs_onnx
@pytest.mark.parametrize("prefix", ["torch", "onnx_int8"])
def test_a_repetition_in_another_process_gives_the_same_bits(tmp_path, graphs, prefix):
    device = Device(tmp_path, config(f"train.prefix={prefix}", "train.micro_batch=16"), 3, graphs)
    first, second = device.train(1), device.train(2, {"prefix": prefix, "micro_batch": 16})
    assert device.train(2, device.planned[0], fresh=True) == second != first
    assert device.planned == [{"prefix": prefix, "micro_batch": 16}] * 3


@needs_onnx
def test_an_engine_is_made_once_a_stage_and_anew_for_other_weights(tmp_path, graphs, monkeypatch):
    made = []
    find = worker.find_means
    monkeypatch.setattr(worker, "find_means", lambda *given: made.append(1) or find(*given))
    device = Device(tmp_path, config("train.prefix=onnx"), 2, graphs)
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


@needs_onnx
@pytest.mark.parametrize(("micro_batch", "judged"), [(3, 8), (16, 16)])
def test_engines_are_judged_by_several_images_from_among_all(tmp_path, graphs, monkeypatch, micro_batch, judged):
    given, make = [], module.make_prefix
    monkeypatch.setattr(module, "make_prefix", lambda *arguments: given.append(arguments[4:6]) or make(*arguments))
    device = Device(tmp_path, config("train.prefix=onnx_int8", f"train.micro_batch={micro_batch}"), 2, graphs)
    device.train(1)
    ((trial, size),) = given
    assert (len(trial), size, device.planned[0]["prefix"]) == (judged, micro_batch, "onnx_int8")
    assert len(torch.unique(trial, dim=0)) == judged


def test_a_server_that_sends_no_graph_leaves_the_frozen_layers_to_torch(tmp_path):
    device = Device(tmp_path, config("train.prefix=onnx", "train.micro_batch=16"), 2)
    device.train(1, {"prefix": "onnx", "micro_batch": 16})
    assert device.planned == [{"prefix": "torch", "micro_batch": 16}]
    assert device.reasons == ["there is no graph for ONNX Runtime"]


WITHOUT_ONNX = """
import json, sys
sys.modules["onnx"] = None
from lwfed.edge_agent.worker import Worker
Worker().handle(json.load(sys.stdin), lambda said: print(json.dumps(said)))
"""


@needs_onnx
def test_a_device_without_the_package_onnx_runs_the_graph_of_the_server(tmp_path, graphs):
    device = Device(tmp_path, config("train.prefix=onnx", "train.micro_batch=16"), 2, graphs)
    order = json.dumps(device.order(round=1))
    done = subprocess.run([sys.executable, "-c", WITHOUT_ONNX], input=order, capture_output=True, text=True, check=True)
    planned, *_, last = (said for line in done.stdout.splitlines() if (said := json.loads(line))["event"] in ("planned", "done"))
    assert (planned["prefix"], planned["reason"], last["event"]) == ("onnx", "as configured", "done")


def test_what_an_earlier_round_has_fixed_wins_over_the_configuration(tmp_path):
    device = Device(tmp_path, config("train.prefix=torch", "train.micro_batch=16"), 2)
    device.train(1, {"prefix": "torch", "micro_batch": 3})
    assert device.planned == [{"prefix": "torch", "micro_batch": 3}]


def test_what_has_no_room_any_more_is_computed_with_fewer_images_at_a_time(tmp_path, monkeypatch):
    """Only where an earlier round has fixed how many, and not the configuration."""
    monkeypatch.setattr(fitting, "micro_batch", lambda config, *_: 2 if config.train.micro_batch == "auto" else refuse())

    def refuse():
        raise Unfit("there is room for 9 MB")

    fixed = {"prefix": "torch", "micro_batch": 3, "features_in": "file"}
    device = Device(tmp_path, config(*REUSED, "train.features_in=memory"), 2)
    device.train(1, fixed)
    assert device.planned == [{"prefix": "torch", "micro_batch": 2}]
    assert device.worker._found[1].features_bytes == 0, "that memory had run out still holds"
    assert "not as before, for stage 2: there is room for 9 MB" in device.reasons[0]
    with pytest.raises(Unfit, match="room for 9 MB"):
        Device(tmp_path, config("train.prefix=torch", "train.micro_batch=3"), 2).train(1, fixed)


@needs_onnx
def test_what_torch_has_no_room_for_any_more_is_computed_by_an_engine_that_has(tmp_path, graphs, monkeypatch):
    """Where an earlier round has fixed torch, and the configuration leaves the choice."""
    room = Room(monkeypatch, "auto", micro_batch="auto")
    room.bytes = room.needs("torch", micro_batch=1) - 1
    device = Device(tmp_path, room.config, 3, graphs)
    device.train(1, {"prefix": "torch", "micro_batch": 4})
    assert device.planned[0]["prefix"] == "onnx_int8"
    assert "torch would take 1 MB more than there is" in device.reasons[0]
    assert "not as before, for stage 3: training in this stage takes" in device.reasons[0]
