"""The demo as users run it. Minutes: `make test-slow`."""

import hashlib
import json

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learning_is_plain_to_see(start, tmp_path, seed):
    demo = start("lwfed", "demo", "--out", tmp_path, "--seed", seed)
    assert demo.result() == 0, demo.transcript()
    report = json.loads((tmp_path / "report.json").read_text())
    trained = report["stages"][-1]["knn"]
    assert trained >= 0.70
    assert trained >= report["random"]["knn"] + 0.20
    assert report["seconds"] < 240
    assert report["encoder_sha256"] == hashlib.sha256((tmp_path / "encoder.safetensors").read_bytes()).hexdigest()
    staged = max(stage["worker_peak_mb"] for stage in report["stages"])
    assert staged < report["end_to_end"]["worker_peak_mb"]
    sent = sum(stage["bytes_up"] for stage in report["stages"])
    assert sent < report["end_to_end"]["bytes_up"]
