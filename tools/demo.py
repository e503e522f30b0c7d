"""The main job, shown: a broker, a server and devices as processes of this machine train on real digits.

The same run is made twice, layer by layer and end to end, so that what layer-wise training saves is measured and not
claimed. The same seed gives the same encoder on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwfed.config import RunConfig, load_config
from lwfed.errors import ConfigError, StateError
from lwfed.tools import account
from lwfed.tools.fleet import run_fleet
from lwfed.tools.machine import machine, needed, versions
from lwfed.tools.screen import Screen

DATA = "digits"
OURS = ("run.seed=", "stages.strategy=", "rounds.min_devices=", "evaluation.")
QUICK = ("stages.rounds_per_stage=1", "train.epochs=1", "calibration.epochs=1")
PACKAGES = ("lwfed", "torch", "numpy", "paho-mqtt", "amqtt", "scikit-learn")


def run_demo(out: Path, seed: int, quick: bool, settings: Sequence[str]) -> None:
    """Leave report.json, report.html, report.png and encoder.safetensors in `out`."""
    for setting in settings:
        if setting.startswith(OURS):
            raise ConfigError(f"--set {setting}: the demo decides on this; use --seed, or `cloud-server serve` for a run of your own")
    command = shlex.join(
        ["lwfed", "demo", "--seed", str(seed), *(["--quick"] if quick else []), *(f"--set={setting}" for setting in settings)]
    )
    settings = (*(QUICK if quick else ()), *settings, f"run.seed={seed}")
    config = load_config("demo", settings)
    settings = (*settings, f"rounds.min_devices={config.data.devices}")
    figure = needed("lwfed.tools.figure", "the demo")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from None
    began = time.monotonic()
    screen = Screen(sys.stdout.isatty())
    with tempfile.TemporaryDirectory(prefix="lwfed-demo-") as scratch:
        staged = _run("layer_wise", settings, Path(scratch) / "layer_wise", screen)
        shutil.copyfile(_encoder(staged), out / "encoder.safetensors")
        whole = _run("end_to_end", settings, Path(scratch) / "end_to_end", screen)
    report = make_report(config, staged, whole)
    report["encoder_sha256"] = hashlib.sha256((out / "encoder.safetensors").read_bytes()).hexdigest()
    report["seconds"] = round(time.monotonic() - began, 1)
    report["command"] = command
    _write(out, report, figure)
    screen.table(report, out)


def _run(strategy: str, settings: Sequence[str], state: Path, screen: Screen) -> list[account.Event]:
    settings = [*settings, f"stages.strategy={strategy}"]
    with screen.run(load_config("demo", settings)):
        return run_fleet("demo", settings, DATA, state, screen.show)


def make_report(config: RunConfig, staged: Sequence[account.Event], whole: Sequence[account.Event]) -> dict[str, Any]:
    return {
        "random": account.baseline(staged, "random"),
        "raw_pixels": account.baseline(staged, "raw_pixels"),
        "stages": account.stages(staged),
        "end_to_end": account.total(account.stages(whole)),
        "seed": config.run.seed,
        "config": config.model_dump(mode="json"),
        "machine": machine(),
        "versions": versions(PACKAGES),
    }


def _write(out: Path, report: dict[str, Any], figure: Any) -> None:
    from lwfed.tools.page import page

    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    picture = figure.draw(report)
    (out / "report.png").write_bytes(picture)
    (out / "report.html").write_text(page(report, picture), encoding="utf-8")


def _encoder(events: Sequence[account.Event]) -> Path:
    return Path(next(event["encoder"] for event in events if event["event"] == "finished"))
