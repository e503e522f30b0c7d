"""A simulated run against the same run over MQTT, with all programs as processes. Minutes: `make test-slow`."""

import hashlib
import json
from pathlib import Path

import pytest

from lwfed.tools.fleet import run_fleet

SETTINGS = ("stages.rounds_per_stage=2", "train.epochs=1", "train.micro_batch=16", "calibration.epochs=1", "model.depth=2")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["layer_wise", "end_to_end"])
def test_a_simulation_gives_the_bits_of_real_processes(start, tmp_path, strategy):
    simulated = start(
        "lwfed", "simulate", "demo", "--data", "digits", "--out", tmp_path / "simulated", "--seeds", "4", "--strategies", strategy,
        *(f"--set={setting}" for setting in SETTINGS),
    )  # fmt: skip
    assert simulated.result() == 0, simulated.transcript()
    (run,) = json.loads((tmp_path / "simulated" / "report.json").read_text())["runs"]
    settings = (*SETTINGS, "run.seed=4", "rounds.min_devices=3", f"stages.strategy={strategy}")
    events = run_fleet("demo", settings, "digits", tmp_path / "real", lambda program, said: None)
    encoder = Path(next(event["encoder"] for event in events if event["event"] == "finished"))
    assert run["encoder_sha256"] == hashlib.sha256(encoder.read_bytes()).hexdigest()
    ended = [event for event in events if event["event"] == "stage" and event["status"] == "ended"]
    assert [stage["knn"] for stage in run["stages"]] == [event["knn"] for event in ended]
    for count in ("bytes_down", "bytes_up"):
        assert sum(stage[count] for stage in run["stages"]) == pytest.approx(sum(event[count] for event in ended), rel=0.1)
