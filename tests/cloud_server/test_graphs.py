"""Graphs of frozen layers: made once a run, announced where layers are frozen, kept over restarts."""

import hashlib
import json
from dataclasses import replace

import pytest

from lwfed.cloud_server.rounds import State

GRAPHS = {engine: hashlib.sha256(f"graph of {engine}".encode()).hexdigest() for engine in ("onnx", "onnx_int8")}


def fleet_of(world, *settings):
    fleet = world("calibration.every=never", "stages.rounds_per_stage=1", "model.depth=3", *settings)
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    return fleet


def announced(fleet):
    """(stage, phase) -> engine -> blob, of all announcements with graphs."""
    return {(run.stage, run.phase): {engine: ref.id for engine, ref in run.graphs.items()} for run in fleet.announced if run.graphs}


def asked_for(fleet):
    return [order["graphs"] for order in fleet.orders if order["do"] == "prepare"]


@pytest.mark.parametrize(("prefix", "engines"), [("auto", ["onnx", "onnx_int8"]), ("onnx_int8", ["onnx_int8"]), ("torch", [])])
def test_they_are_made_once_and_announced_to_those_who_train_above_frozen_layers(world, said, prefix, engines):
    fleet = fleet_of(world, f"train.prefix={prefix}")
    fleet.finish()
    assert asked_for(fleet) == [engines, [], []]
    expected = {engine: GRAPHS[engine] for engine in engines}
    assert announced(fleet) == ({(2, "training"): expected, (3, "training"): expected} if engines else {})
    chunks = [topic for _, topic, _ in fleet.broker.log if topic.rpartition("/")[0].rpartition("/")[2] in GRAPHS.values()]
    assert len(chunks) == len(engines)  # each travelled once, for all devices and stages
    assert all((fleet.root / name / "held" / blob).is_file() for name in ("a", "b") for blob in expected.values())
    assert not [one for one in said if one["event"] == "warning"]


@pytest.mark.parametrize("settings", [["stages.strategy=end_to_end"], ["stages.strategy=progressive"], ["worker.device=cuda"]])
def test_a_run_in_which_no_device_could_use_them_makes_none(world, settings):
    assert asked_for(fleet_of(world, "train.prefix=auto", *settings))[0] == []


def test_a_server_that_restarts_announces_the_same(world):
    fleet = fleet_of(world, "train.prefix=auto")
    fleet.settle(until=lambda: fleet.course.state.stage == 2 and fleet.course.state.phase == "training")
    fleet.kill()
    fleet.broker.log.clear()
    fleet.start()
    fleet.finish()
    assert announced(fleet) == {(2, "training"): GRAPHS, (3, "training"): GRAPHS}
    assert asked_for(fleet) == [["onnx", "onnx_int8"], [], []]


def test_a_graph_that_the_disk_has_lost_is_made_again_with_the_next_stage(world):
    fleet = fleet_of(world, "train.prefix=auto")
    fleet.settle(until=lambda: fleet.course.state.stage == 2 and fleet.course.state.phase == "training")
    fleet.kill()
    (fleet.root / "server" / "model" / GRAPHS["onnx"]).unlink()
    fleet.broker.log.clear()
    fleet.start()
    fleet.finish()
    assert announced(fleet) == {(2, "training"): {"onnx_int8": GRAPHS["onnx_int8"]}, (3, "training"): GRAPHS}
    assert asked_for(fleet) == [["onnx", "onnx_int8"], [], ["onnx"]]


def test_a_run_that_was_stored_before_there_were_graphs_has_them_from_its_next_stage(world):
    fleet = fleet_of(world, "train.prefix=auto")
    fleet.settle(until=lambda: fleet.course.state.stage == 2 and fleet.course.state.phase == "training")
    with fleet.course.store.step(replace(fleet.course.state, graphs={})):
        pass
    fleet.kill()
    fleet.broker.log.clear()
    fleet.start()
    fleet.finish()
    assert announced(fleet) == {(3, "training"): GRAPHS}


def test_a_state_that_was_stored_before_there_were_graphs_is_read():
    assert State.from_json(json.dumps({"phase": "training", "stage": 2})) == State(phase="training", stage=2)


def test_a_server_that_can_make_none_says_so_once_and_the_run_goes_on(world, said):
    fleet = world("calibration.every=never", "stages.rounds_per_stage=1", "model.depth=3", "train.prefix=auto")
    fleet.no_graphs = "they need the package onnx: pip install onnx"
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    fleet.finish()
    assert announced(fleet) == {}
    warnings = [one["text"] for one in said if one["event"] == "warning"]
    assert len(warnings) == 1
    assert "run frozen layers by torch, which takes longer: they need the package onnx: pip install onnx" in warnings[0]
    assert asked_for(fleet) == [["onnx", "onnx_int8"]] * 3  # somebody may have installed it
