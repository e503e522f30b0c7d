import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lwfed.blobs import BlobStore
from lwfed.cloud_server.broker import find_mosquitto
from lwfed.cloud_server.weights import check
from lwfed.config import load_config
from lwfed.models.shapes import part_shapes
from lwfed.tools.cli import main
from lwfed.tools.load.canned import Training
from lwfed.tools.load.command import Log, Used, summary
from lwfed.wire import deltas, tensors
from lwfed.wire.sizes import stated_shapes

SMALL = ("model.depth=1", "model.width=16", "model.heads=2", "ssl.hidden_dim=16", "ssl.output_dim=8")
USED = {"server": Used(100.0, 2.0), "broker": Used(10.0, 1.0)}


@pytest.fixture
def prepared(tmp_path):
    """Orders of one round: (training, config, by participant), with the parts of a small model in its store."""

    def prepare(codec):
        config = load_config("base", [*SMALL, f"transfer.codec={codec}"])
        store, random = BlobStore(tmp_path / "model", durable=False), np.random.default_rng(0)
        parts = {}
        for part in config.plan(1).present:
            shapes = part_shapes(config, part)
            parts[part] = store.put(tensors.encode({name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()})).id
        (tmp_path / "config").write_bytes(config.to_bytes())

        def order(participant, round=1):
            told = {part: str(store.path(blob)) for part, blob in parts.items()}
            place = {"stage": 1, "round": round, "participant": participant, "out": str(tmp_path / f"{participant}-{round}")}
            return {"config": str(tmp_path / "config"), "parts": told, **place}

        return Training(store), config, order

    return prepare


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_the_server_takes_every_canned_update_and_no_two_are_the_same(prepared, codec):
    training, config, order = prepared(codec)
    made = [training.train(order(*place)).file for place in ((0, 1), (1, 1), (9_999, 1), (0, 2))]
    received = [Path(file) for file in order(0)["parts"].values()]
    for file in made:
        check(config.transfer, received, file)
    assert len({file.read_bytes() for file in made}) == 4


def test_differences_are_made_parts_as_a_device_makes_them(prepared):
    training, config, order = prepared("int8")
    told = order(0)
    base = Path(told["parts"]["layer.1"])
    before = tensors.decode(base, stated_shapes(base))
    shapes = {name: tensor.shape for name, tensor in before.items()}
    data = deltas.encode({name: np.ones_like(tensor) for name, tensor in before.items()}, "int8", 1.0, 0).data
    patch = base.with_name("patch")
    patch.write_bytes(data)
    change = deltas.decode(data, shapes, "int8")
    made = BlobStore(base.parents[1] / "expected", durable=False).put(
        tensors.encode({name: before[name] + change[name] for name in before})
    )
    told["parts"]["layer.1"] = {"base": str(base), "patches": [str(patch)], "id": made.id}
    assert training.received(told) == {made.id}
    check(config.transfer, [Path(file) for file in order(0)["parts"].values()], training.train(told).file)


def log_of(*said):
    log = Log()
    for event in said:
        log.note(event)
    return log


def round_of(number, start, updates=2):
    return (
        {"event": "round", "status": "started", "round": number, "devices": 2, "time": start},
        {"event": "contribution", "time": start + 3.0},
        {"event": "contribution", "time": start + 4.0},
        {"event": "round", "status": "closed", "round": number, "devices": updates, "time": start + 5.0},
    )


def test_times_are_those_of_the_rounds_after_the_first_one():
    log = log_of(*round_of(1, 0.0), *round_of(2, 105.0), {"event": "stage", "status": "ended", "time": 111.5}, {"event": "finished"})
    tally = {"accepted": 4, "refused": 0, "update_bytes": 7, "disconnections": 0}
    found = summary(2, 2, log, tally, 4, USED)
    assert log.over
    assert (found["download_s"], found["upload_s"], found["close_s"], found["updates_per_s"]) == (3.0, 2.0, 1.5, 1.0)
    assert (found["server_peak_mb"], found["broker_cpu_s"], found["lost"]) == (100.0, 1.0, 0)


@pytest.mark.parametrize(("accepted", "recorded", "updates"), [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_an_update_is_lost_when_anybody_misses_it(accepted, recorded, updates):
    log = log_of(*round_of(1, 0.0, updates), {"event": "stage", "status": "ended", "time": 6.0})
    tally = {"accepted": accepted, "refused": 0, "update_bytes": 7, "disconnections": 0}
    assert summary(2, 1, log, tally, recorded, USED)["lost"] == 1


@pytest.mark.parametrize("broker", ["mosquitto", pytest.param("embedded", marks=pytest.mark.slow)])
def test_a_small_load(broker):
    if broker == "mosquitto" and not find_mosquitto():
        pytest.skip("mosquitto is not installed")
    sets = [word for setting in SMALL for word in ("--set", setting)]
    result = CliRunner().invoke(main, ["bench", "server", "--devices", "12", "--rounds", "2", "--broker", broker, "--json", *sets])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (found,) = report["loads"]
    assert (found["expected"], found["recorded"], found["counted"], found["accepted"], found["lost"]) == (24, 24, 24, 24, 0)
    assert (found["refused"], found["warnings"]) == (0, [])
    assert [one["updates"] for one in found["rounds"]] == [12, 12]
    assert found["server_peak_mb"] > found["broker_peak_mb"] > 0
    assert found["worker_peak_mb"] > 0, "what aggregates"


@pytest.mark.parametrize("setting", ["rounds.sample=2", "run.name=other", "model.depth=2"])
def test_what_the_load_test_decides_on_is_not_set(setting):
    result = CliRunner().invoke(main, ["bench", "server", "--set", setting])
    assert result.exit_code != 0
    assert "load test" in result.output


def test_options_of_the_comparison_are_not_swallowed():
    result = CliRunner().invoke(main, ["bench", "--quick", "server"])
    assert result.exit_code == 2
    assert "behind `server`" in result.output
